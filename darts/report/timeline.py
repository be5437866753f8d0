"""The figures of `darts.report` on time within a step: the timeline of one step, and log-probs under the rollout.

Contract: as `darts.report.figures`, whose table `FIGURES` continues. Only what was measured is drawn at its place: the
rollout and the actor's calls by their clocks (`darts.evidence.trace.timeline_columns`). The phases after generation are
known by their seconds alone, and are laid end to end in the order in which the trainer runs them.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from darts.evidence.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PHASES, RED, Missing, dress
from darts.evidence.trace import INSIDE_STEP
from darts.report.figures import Figures, how_drawn, plot_lines, plot_stack
from darts.report.run import Run, RunStep, Timeline, first_and_last

HIDDEN, EXPOSED, CANDIDATES, SHADE = BLUE, RED, "#B9B4DA", "#F3F2F9"
LOG_PROBS = ("old_log_prob", "ref")  # phases whose work can be done under the rollout
REST, OTHER = "rest of gen", "other"
SHORTEST_CALL_S = 1e-3  # times of calls are told to the millisecond


def phases_after(step: RunStep, rollout_s: float) -> list[tuple[str, float, float]]:
    """What a step did after its rollout: name, begin and length in seconds since the rollout began, end to end.

    Example: `[("rest of gen", 12.5, 0.3), ("reward", 12.8, 0.0), ("old_log_prob", 12.8, 2.1), ...]`; last comes what
    verl does not name, which may have been anywhere between.
    """
    known_phases = {name: step.values[f"timing_s/{name}"] for name in INSIDE_STEP if f"timing_s/{name}" in step.values}
    gen_s = known_phases.pop("gen", rollout_s)
    other_s = step.values["timing_s/step"] - gen_s - sum(known_phases.values())
    begin_s, phases = rollout_s, []
    for name, seconds in {REST: gen_s - rollout_s, **known_phases, OTHER: other_s}.items():
        if seconds > 0 or name in known_phases:
            phases.append((name, begin_s, seconds))
            begin_s += seconds
    return phases


def hidden_and_exposed(timeline: Timeline) -> tuple[float, float]:
    """Seconds in which the actor computed log-probs while the rollout ran, and those in which training waited."""
    step_values, actor_calls = timeline.step.values, timeline.calls
    measured_s = np.maximum(np.minimum(actor_calls[:, 1], timeline.seconds) - actor_calls[:, 0], 0).sum()
    exposed_s = sum(step_values.get(f"timing_s/{name}", 0.0) for name in LOG_PROBS)
    return step_values.get("darts/overlap/hidden_s", float(measured_s)), exposed_s


def _seconds(value: float) -> str:
    """For people: 132 s, 4.1 s, 0.05 s, <0.01 s."""
    if value < 0.01:
        return "<0.01 s"
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def _timeline(run: Run) -> tuple[Figure, str]:
    timeline = run.timeline
    if timeline is None:
        raise Missing("no step has a timeline and timing_s/step (a trace of an older version, or darts.enable=false?).")
    step, has_calls = timeline.step, len(timeline.calls) > 0
    phases, step_s = phases_after(step, timeline.seconds), step.values["timing_s/step"]
    end_s = max(step_s, *(begin_s + seconds for _, begin_s, seconds in phases), timeline.seconds)
    # 1. A panel for the candidates, one for the calls if there are some, one for the phases.
    calls_panel = {_draw_calls: 1.15} if has_calls else {}
    panels = {_draw_candidates: 2.0, **calls_panel, _draw_phases: 0.27 * len(phases) + 0.1}
    figure = Figure(figsize=(11, sum(panels.values()) + 2.0 + 0.3 * has_calls))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=list(panels.values()))[:, 0]
    for axes, draw_panel in zip(grid, panels, strict=True):
        axes.axvspan(0, timeline.seconds, color=SHADE, zorder=0)
        axes.axvline(timeline.seconds, color=GREY, linewidth=1, linestyle="--")
        draw_panel(axes, timeline)
    for axes in grid[:-1]:
        axes.set_xlabel("")
    grid[-1].set_xlim(0, 1.1 * end_s)  # there is room for the last label
    grid[-1].xaxis.set_major_formatter("{x:,g}")
    # 2. What the title says of the log-probs.
    hidden_s, exposed_s = hidden_and_exposed(timeline)
    title = f"Step {step.number}: {_seconds(step_s)}, rollout {_seconds(timeline.seconds)}"
    if has_calls:
        title += f"; log-probs: {_seconds(hidden_s)} hidden under the rollout, {_seconds(exposed_s)} exposed"
        if timeline.seconds > 0.4 * end_s:  # there is room
            row = next((row for row, (name, _, _) in enumerate(phases) if name in LOG_PROBS), 0)
            _label(grid[-1], f"{_seconds(hidden_s)} hidden", (timeline.seconds, row), HIDDEN, "bold", on_left=True)
    elif any(f"timing_s/{name}" in step.values for name in LOG_PROBS):
        title += f"; log-probs: {_seconds(exposed_s)}, all exposed"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure, _caption(timeline)


def _label(axes: Axes, text: str, at: tuple[float, float], color: str, weight: str, on_left: bool = False) -> None:
    """Writes beside a point, on its right or on its left."""
    axes.annotate(
        text, at, (-6 if on_left else 5, 0), textcoords="offset points", ha="right" if on_left else "left",
        va="center", fontsize=10, color=color, fontweight=weight,
    )  # fmt: skip


def _caption(timeline: Timeline) -> str:
    median_text = f"has the median time of the last {timeline.chosen_of} steps with a timeline"
    choice_text = {0: "was asked for", 1: "is the last with a timeline"}.get(timeline.chosen_of, median_text)
    calls, num_calls = timeline.step.values.get("darts/overlap/calls", 0), len(timeline.calls)
    middle = ""
    if num_calls > 0:
        middle = (
            " Middle: calls of the actor for log-probs; a bar's area is its tokens, blue is hidden under the rollout, "
            "orange is not."
        )
    if calls > num_calls > 0:
        middle += f" The {calls:,.0f} calls are drawn as {num_calls}: neighbours are joined."
    return (
        f"Step {timeline.step.number} {choice_text}. Above: candidates that have not ended, those included that wait "
        f"for a place in an engine; a flat part on the right is a tail.{middle} Below: what the step did after the "
        "rollout, end to end in the order of the trainer; where in it the other, which verl does not name, was is not "
        "known. Orange: log-probs that training waits for."
    )


def _draw_candidates(axes: Axes, timeline: Timeline) -> None:
    begin_s, running = timeline.running.T
    edge_s = np.append(begin_s, max(timeline.seconds, begin_s[-1]))
    axes.stairs(running, edge_s, fill=True, color=CANDIDATES)
    axes.stairs(running, edge_s, color=PHASES["gen"], linewidth=1.4, baseline=None)
    axes.set_ylim(0, 1.05 * max(running.max(), 1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    half, most = (_seconds(begin_s[np.argmax(running <= share * running[0])]) for share in (0.5, 0.05))
    dress(axes, f"Rollout: {running[0]:,.0f} candidates; half have ended after {half}, 95% after {most}", "not ended")


def _draw_calls(axes: Axes, timeline: Timeline) -> None:
    begin_s, end_s, call_tokens = timeline.calls.T
    end_s = np.maximum(end_s, begin_s + SHORTEST_CALL_S)
    token_rate, cut = call_tokens / (end_s - begin_s), timeline.seconds
    for color, first_s, last in ((HIDDEN, begin_s, np.minimum(end_s, cut)), (EXPOSED, np.maximum(begin_s, cut), end_s)):
        shown = last > first_s
        axes.bar(first_s[shown], token_rate[shown], (last - first_s)[shown], align="edge", color=color, linewidth=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    hidden_s, _ = hidden_and_exposed(timeline)
    call_count = timeline.step.values.get("darts/overlap/calls", len(begin_s))
    busy_text = f", busy {hidden_s / cut:.0%} of the rollout" if cut > 0 else ""
    dress(axes, f"Actor: {call_count:,.0f} calls for log-probs, {call_tokens.sum():,.0f} tokens{busy_text}", "tokens/s")


def _draw_phases(axes: Axes, timeline: Timeline) -> None:
    phases = phases_after(timeline.step, timeline.seconds)
    for row, (name, begin_s, seconds) in enumerate(phases):
        is_exposed = name in LOG_PROBS
        bar_color = EXPOSED if is_exposed else PHASES["gen" if name == REST else name]
        axes.barh(row, seconds, left=begin_s, color=bar_color, height=0.75, edgecolor=bar_color, linewidth=1)
        label_look = (EXPOSED, "bold") if is_exposed else (BLACK, "normal")
        _label(axes, _seconds(seconds), (begin_s + seconds, row), *label_look)
    axes.set_yticks(range(len(phases)), [name for name, _, _ in phases])
    axes.set_ylim(len(phases) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    dress(axes, "After the rollout", "", "seconds since the rollout began")


def _overlap(run: Run) -> tuple[Figure, str]:
    hidden_s, exposed_s = (run.series(f"darts/overlap/{name}_s") for name in ("hidden", "exposed"))
    if not np.isfinite(hidden_s).any():
        raise Missing("no step has darts/overlap/* (was darts.overlap.mode=off?).")
    figure = Figure(figsize=(11, 4.4))
    left_axes, right_axes = figure.subplots(1, 2)
    stack_parts = {"hidden under the rollout": hidden_s, "exposed": exposed_s}
    plot_stack(left_axes, run, stack_parts, dict(zip(stack_parts, (HIDDEN, EXPOSED), strict=True)))
    dress(left_axes, "Log-probs of a step", "seconds", legend=2)
    shares = {"seconds": "hidden", "kept tokens, before own end": "before_end", "kept tokens": "in_rollout"}
    metrics = {label: f"darts/overlap/{name}_share" for label, name in shares.items()}
    plot_lines(right_axes, run, metrics, (BLUE, ORANGE, GREEN), scale=100)
    right_axes.set_ylim(0, 104)
    dress(right_axes, "Share done under the rollout", "%", legend=3)
    return figure, overlap_sentence(run) + how_drawn(run, "lines", "columns")


def overlap_sentence(run: Run) -> str:
    """What overlap did in the last tenth of the steps, in words, and what is not healthy."""
    share_forms = {
        "hidden_share": "{:.1%} of the seconds for log-probs are hidden under the rollout",
        "forwarded_per_kept": "{:.2f} tokens (prompts too) are forwarded per kept response token",
        "before_end_share": "{:.1%} of the kept tokens have their log-probs before their response's own end",
    }
    end_shares = {form: first_and_last(run.series(f"darts/overlap/{name}"))[1] for name, form in share_forms.items()}
    shares = "; ".join(form.format(share) for form, share in end_shares.items() if math.isfinite(share))
    text = f"Over the last tenth of the steps {shares}." if shares else ""
    peak_gib = np.nan_to_num(run.series("darts/overlap/cache_peak_gib")).max()
    if peak_gib > 0:
        text += f" The cache of prefixes took at most {peak_gib:.3g} GiB on a rank."
    text += " Hidden seconds are more than what they spare: they include dropped candidates, prompts and small batches."
    unhealthy = {
        "late_rows": "kept rows were computed by verl after generation",
        "tokens_twice": "tokens were forwarded twice",
    }
    for name, event in unhealthy.items():
        if event_count := np.nansum(run.series(f"darts/overlap/{name}")):
            text += f" Not healthy: {event_count:,.0f} {event}."
    return text.strip()


FIGURES: Figures = {"timeline": ("Timeline of a step", _timeline), "overlap": ("Log-probs under the rollout", _overlap)}
