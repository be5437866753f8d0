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
from darts.report.figures import Figures, how_drawn, plot_line, plot_stack
from darts.report.run import Run, RunStep, Timeline, first_and_last

HIDDEN, EXPOSED, CANDIDATES, SHADE = BLUE, RED, "#B9B4DA", "#F3F2F9"
LOG_PROBS = ("old_log_prob", "ref")
"""Phases whose work can be done under the rollout."""
REST, OTHER = "rest of gen", "other"
SHORTEST_CALL_S = 1e-3  # times of calls are told to the millisecond


# --- one step --------------------------------------------------------------------------------------------------------


def phases_after(step: RunStep, rollout_s: float) -> list[tuple[str, float, float]]:
    """What a step did after its rollout: name, begin and length in seconds since the rollout began, end to end.

    Example: `[("rest of gen", 12.5, 0.3), ("reward", 12.8, 0.0), ("old_log_prob", 12.8, 2.1), ...]`; last comes what
    verl does not name, which may have been anywhere between.
    """
    known = {name: step.values[f"timing_s/{name}"] for name in INSIDE_STEP if f"timing_s/{name}" in step.values}
    gen = known.pop("gen", rollout_s)
    other = step.values["timing_s/step"] - gen - sum(known.values())
    parts = {REST: gen - rollout_s, **known, OTHER: other}
    begin, phases = rollout_s, []
    for name, seconds in parts.items():
        if seconds > 0 or name in known:
            phases.append((name, begin, seconds))
            begin += seconds
    return phases


def hidden_and_exposed(timeline: Timeline) -> tuple[float, float]:
    """Seconds in which the actor computed log-probs while the rollout ran, and those in which training waited."""
    values, calls = timeline.step.values, timeline.calls
    measured = np.maximum(np.minimum(calls[:, 1], timeline.seconds) - calls[:, 0], 0).sum()
    exposed = sum(values.get(f"timing_s/{name}", 0.0) for name in LOG_PROBS)
    return values.get("darts/overlap/hidden_s", float(measured)), exposed


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
    phases = phases_after(step, timeline.seconds)
    heights = [2.0, *([1.15] if has_calls else []), 0.27 * len(phases) + 0.1]
    figure = Figure(figsize=(11, sum(heights) + 2.0 + 0.3 * has_calls))
    grid = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    end = max(step.values["timing_s/step"], *(begin + seconds for _, begin, seconds in phases), timeline.seconds)
    for axes in grid:
        axes.axvspan(0, timeline.seconds, color=SHADE, zorder=0)
        axes.axvline(timeline.seconds, color=GREY, linewidth=1, linestyle="--")
    _draw_candidates(grid[0], timeline)
    if has_calls:
        _draw_calls(grid[1], timeline)
    _draw_phases(grid[-1], phases)
    for axes in grid[:-1]:
        axes.set_xlabel("")
    grid[-1].set_xlim(0, 1.1 * end)  # there is room for the last label
    grid[-1].xaxis.set_major_formatter("{x:,g}")
    hidden, exposed = hidden_and_exposed(timeline)
    title = f"Step {step.number}: {_seconds(step.values['timing_s/step'])}, rollout {_seconds(timeline.seconds)}"
    if has_calls:
        title += f"; log-probs: {_seconds(hidden)} hidden under the rollout, {_seconds(exposed)} exposed"
        if timeline.seconds > 0.4 * end:  # there is room
            rows = [row for row, (name, _, _) in enumerate(phases) if name in LOG_PROBS]
            _say_hidden(grid[-1], timeline.seconds, rows[0] if rows else 0, hidden)
    elif any(f"timing_s/{name}" in step.values for name in LOG_PROBS):
        title += f"; log-probs: {_seconds(exposed)}, all exposed"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure, _caption(timeline)


def _caption(timeline: Timeline) -> str:
    several = f"has the median time of the last {timeline.chosen_of} steps with a timeline"
    chosen = {0: "was asked for", 1: "is the last with a timeline"}.get(timeline.chosen_of, several)
    parts = [
        f"Step {timeline.step.number} {chosen}.",
        "Above: candidates that have not ended, those included that wait for a place in an engine; a flat part on "
        "the right is a tail.",
    ]
    if len(timeline.calls):
        parts.append(
            "Middle: calls of the actor for log-probs; a bar's area is its tokens, blue is hidden under the rollout, "
            "orange is not."
        )
        calls = timeline.step.values.get("darts/overlap/calls", 0)
        if calls > len(timeline.calls):
            parts.append(f"The {calls:,.0f} calls are drawn as {len(timeline.calls)}: neighbours are joined.")
    parts.append(
        "Below: what the step did after the rollout, end to end in the order of the trainer; where in it the "
        "other, which verl does not name, was is not known. Orange: log-probs that training waits for."
    )
    return " ".join(parts)


def _draw_candidates(axes: Axes, timeline: Timeline) -> None:
    begins, running = timeline.running.T
    edges = np.append(begins, max(timeline.seconds, begins[-1]))
    axes.stairs(running, edges, fill=True, color=CANDIDATES)
    axes.stairs(running, edges, color=PHASES["gen"], linewidth=1.4, baseline=None)
    axes.set_ylim(0, 1.05 * max(running.max(), 1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    half, most = (_seconds(begins[np.argmax(running <= share * running[0])]) for share in (0.5, 0.05))
    dress(axes, f"Rollout: {running[0]:,.0f} candidates; half have ended after {half}, 95% after {most}", "not ended")


def _draw_calls(axes: Axes, timeline: Timeline) -> None:
    begin, end, tokens = timeline.calls.T
    end = np.maximum(end, begin + SHORTEST_CALL_S)
    speed, cut = tokens / (end - begin), timeline.seconds
    for color, left, right in ((HIDDEN, begin, np.minimum(end, cut)), (EXPOSED, np.maximum(begin, cut), end)):
        some = right > left
        axes.bar(left[some], speed[some], (right - left)[some], align="edge", color=color, linewidth=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    hidden, _ = hidden_and_exposed(timeline)
    calls = timeline.step.values.get("darts/overlap/calls", len(begin))
    busy = f", busy {hidden / cut:.0%} of the rollout" if cut > 0 else ""
    dress(axes, f"Actor: {calls:,.0f} calls for log-probs, {tokens.sum():,.0f} tokens{busy}", "tokens/s")


def _draw_phases(axes: Axes, phases: list[tuple[str, float, float]]) -> None:
    names = [name for name, _, _ in phases]
    colors = [EXPOSED if name in LOG_PROBS else PHASES["gen" if name == REST else name] for name in names]
    rows, begins, seconds = np.arange(len(phases)), *(np.array([phase[i] for phase in phases]) for i in (1, 2))
    axes.barh(rows, seconds, left=begins, color=colors, height=0.75, edgecolor=colors, linewidth=1)
    for row, name, at, length in zip(rows, names, begins, seconds, strict=True):
        bold = "bold" if name in LOG_PROBS else "normal"
        axes.annotate(
            _seconds(length), (at + length, row), (5, 0), textcoords="offset points", va="center", fontsize=10,
            color=EXPOSED if name in LOG_PROBS else BLACK, fontweight=bold,
        )  # fmt: skip
    axes.set_yticks(rows, names)
    axes.set_ylim(len(phases) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    dress(axes, "After the rollout", "", "seconds since the rollout began")


def _say_hidden(axes: Axes, end: float, row: int, hidden: float) -> None:
    """Beside what is exposed, on the other side of the rollout's end."""
    axes.annotate(
        f"{_seconds(hidden)} hidden", (end, row), (-6, 0), textcoords="offset points", ha="right", va="center",
        fontsize=10, color=HIDDEN, fontweight="bold",
    )  # fmt: skip


# --- over the run ----------------------------------------------------------------------------------------------------


def _overlap(run: Run) -> tuple[Figure, str]:
    hidden, exposed = (run.series(f"darts/overlap/{name}_s") for name in ("hidden", "exposed"))
    if not np.isfinite(hidden).any():
        raise Missing("no step has darts/overlap/* (was darts.overlap.mode=off?).")
    figure = Figure(figsize=(11, 4.4))
    left, right = figure.subplots(1, 2)
    parts = {"hidden under the rollout": hidden, "exposed": exposed}
    plot_stack(left, run, parts, dict(zip(parts, (HIDDEN, EXPOSED), strict=True)))
    dress(left, "Log-probs of a step", "seconds", legend=2)
    shares = {
        "seconds": ("hidden_share", BLUE, "-"),
        "kept tokens, before own end": ("before_end_share", ORANGE, "-"),
        "kept tokens": ("in_rollout_share", GREEN, "--"),
    }
    for label, (name, color, form) in shares.items():
        plot_line(right, run, 100 * run.series(f"darts/overlap/{name}"), color, label, form)
    right.set_ylim(0, 104)
    dress(right, "Share done under the rollout", "%", legend=3)
    return figure, overlap_sentence(run) + how_drawn(run, "lines", "columns")


def overlap_sentence(run: Run) -> str:
    """What overlap did in the last tenth of the steps, in words, and what is not healthy."""

    def at_end(name: str) -> float:
        return first_and_last(run.series(f"darts/overlap/{name}"))[1]

    parts = {
        "hidden_share": "{:.1%} of the seconds for log-probs are hidden under the rollout",
        "forwarded_per_kept": "{:.2f} tokens (prompts too) are forwarded per kept response token",
        "before_end_share": "{:.1%} of the kept tokens have their log-probs before their response's own end",
    }
    said = "; ".join(form.format(at_end(name)) for name, form in parts.items() if math.isfinite(at_end(name)))
    text = f"Over the last tenth of the steps {said}." if said else ""
    peak = np.nan_to_num(run.series("darts/overlap/cache_peak_gib")).max()
    if peak > 0:
        text += f" The cache of prefixes took at most {peak:.3g} GiB on a rank."
    text += " Hidden seconds are more than what they spare: they include dropped candidates, prompts and small batches."
    for name, what in (
        ("late_rows", "kept rows were computed by verl after generation"),
        ("tokens_twice", "tokens were forwarded twice"),
    ):
        total = np.nansum(run.series(f"darts/overlap/{name}"))
        if total:
            text += f" Not healthy: {total:,.0f} {what}."
    return text.strip()


FIGURES: Figures = {
    "timeline": ("Timeline of a step", _timeline),
    "overlap": ("Log-probs under the rollout", _overlap),
}
