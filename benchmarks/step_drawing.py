"""The picture of `benchmarks.step_figure`; needs matplotlib.

Contract: as `darts.report_figures`: a figure and a sentence. Kinds of candidates are told apart by lightness and by the
mark at their end, not by colour alone.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.step_figure import complete_at, in_rollout, kinds, step_of
from darts.report_figures import BLACK, GREEN, GREY, ORANGE, PHASES, RED, SKY
from darts.report_timeline import HIDDEN, LOG_PROBS, SHADE, phases_after

COLORS = {
    "short": SKY, "long": GREEN, "dropped": "#D9D9D9", "aborted": ORANGE, "truncated": "#999999", "lost": BLACK,
}  # fmt: skip
SAID = {
    "short": "kept: among the shortest",
    "long": "kept: the longest",
    "dropped": "ended, dropped",
    "aborted": "aborted (x)",
    "truncated": "hit the limit, dropped",
    "lost": "lost",
}
GAP = 2.0  # rows between groups


def figure_of(data: dict[str, Any]) -> tuple[Figure, str]:
    """Candidates of some prompts above, the whole step below."""
    shown = sorted(set(data["prompt"]), key=lambda prompt: complete_at(data, prompt))
    rows = len(data["prompt"]) + GAP * len(shown)
    figure = Figure(figsize=(11, 0.125 * rows + 3.6))
    above, below = figure.subplots(2, 1, height_ratios=(0.125 * rows, 1.15))
    seconds = data["seconds"]
    for axes in (above, below):
        axes.axvline(seconds, color=GREY, linewidth=1, linestyle="--", zorder=1)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    _candidates(above, data, shown)
    latest = max([seconds, *(at for parts in data["computed"] for at, _ in parts)])
    above.set_xlim(0, 1.01 * max(latest, 1.04 * seconds))
    below.axvspan(0, seconds, color=SHADE, zorder=0)
    below.set_xlim(0, 1.01 * _phases(below, data))
    above.set_title(f"Rollout, {seconds:.2f} s: the candidates of {len(shown)} of {data['prompts']} prompts", pad=46)
    above.legend(handles=_above(kinds(data)), loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)
    below.set_title(f"The whole step, {data['metrics']['timing_s/step']:.2f} s", pad=26)
    below.legend(handles=_below(), loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)
    for axes in (above, below):
        axes.set_xlabel("seconds since the rollout began")
    hidden, own = in_rollout(data)
    caption = (
        f"Of the kept tokens that are shown {own:.0%} had their log-probs when their own response ended, {hidden:.0%} "
        "when the rollout ended."
    )
    return figure, caption


def _candidates(axes: Axes, data: dict[str, Any], shown: Sequence[int]) -> None:
    kind, at, labels = kinds(data), 0.0, []
    for prompt in shown:
        rows = [row for row, of in enumerate(data["prompt"]) if of == prompt]
        rows.sort(key=lambda row: (data["ended"][row], data["length"][row]))
        places = {row: at + place for place, row in enumerate(rows)}
        for row, place in places.items():
            ended = data["ended"][row]
            axes.barh(place, ended, height=0.78, color=COLORS[kind[row]], linewidth=0, zorder=2)
            if kind[row] == "aborted":
                axes.plot(ended, place, marker="x", color=BLACK, markersize=4.5, markeredgewidth=1.2, zorder=5)
            if kind[row] in ("short", "long"):
                times = [time for time, tokens in data["computed"][row] if tokens]
                axes.vlines(times, place - 0.36, place + 0.36, color=BLACK, linewidth=1.1, zorder=4)
        complete, last = complete_at(data, prompt), at + len(rows) - 1
        axes.vlines(complete, at - 0.75, last + 0.75, color=RED, linewidth=2, zorder=3)
        left = complete > 0.8 * data["seconds"]
        axes.annotate(
            f"complete: {complete:.2f} s", (complete, at - 0.6), (-5 if left else 5, 0), textcoords="offset points",
            va="bottom", ha="right" if left else "left", fontsize=9.5, color=RED, fontweight="bold",
        )  # fmt: skip
        num_long, kept = data["num_long"][rows[0]], sum(data["fate"][row] in "kf" for row in rows)
        what = "dual-end" if num_long else "shortest-only"
        keeps = f"{kept - num_long} shortest + {num_long} longest" if num_long else f"the first {kept}"
        labels.append(((at + last) / 2, f"{what}\n{len(rows)} candidates\nkeeps {keeps}"))
        at = last + 1 + GAP
    axes.set_yticks([place for place, _ in labels], [text for _, text in labels], fontsize=9.5)
    axes.set_ylim(at - GAP, -2.6)


def _phases(axes: Axes, data: dict[str, Any]) -> float:
    """Draws the lanes; returns when the step ended."""
    seconds, end = data["seconds"], data["seconds"]
    axes.barh(0, seconds, height=0.7, color=PHASES["gen"], linewidth=0)
    axes.annotate("generate", (seconds / 2, 0), ha="center", va="center", color="white", fontsize=10)
    for begin, stop, _ in data["calls"]:
        for color, left, right in ((HIDDEN, begin, min(stop, seconds)), (RED, max(begin, seconds), stop)):
            if right > left:
                axes.barh(1, right - left, left=left, height=0.7, color=color, linewidth=0.6, edgecolor="white")
    lanes = {"update_weights": 0, "update_actor": 1, **dict.fromkeys(LOG_PROBS, 1)}
    for name, begin, length in phases_after(step_of(data), seconds):
        end = max(end, begin + length)
        lane = lanes.get(name, 2)
        color = PHASES["other"] if lane == 2 else RED if name in LOG_PROBS else PHASES[name]
        axes.barh(lane, length, left=begin, height=0.7, color=color, linewidth=0.5, edgecolor=color)
        if name == "update_actor":
            axes.annotate("update", (begin + length / 2, lane), ha="center", va="center", color=BLACK, fontsize=10)
    axes.set_yticks([0, 1, 2], ["servers", "actor", "trainer"])
    axes.set_ylim(2.55, -0.6)
    return end


def _above(found: Sequence[str]) -> list[Any]:
    line = {"linestyle": "none", "marker": "|", "markersize": 9}
    return [
        *(Patch(color=COLORS[name], label=text) for name, text in SAID.items() if name in found),
        Line2D([], [], color=BLACK, markeredgewidth=1.1, label="log-probs of a part are there", **line),
        Line2D([], [], color=RED, markeredgewidth=2, label="group complete", **line),
        Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="end of the rollout"),
    ]


def _below() -> list[Any]:
    parts = {
        "log-probs, hidden": HIDDEN,
        "log-probs, exposed": RED,
        "weights to the servers": PHASES["update_weights"],
        "rewards, advantages, other": PHASES["other"],
    }
    return [Patch(color=color, label=label) for label, color in parts.items()]
