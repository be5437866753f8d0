"""The figures of a bench: `BenchResults` in, PNG files with a sentence each that says how to read them.

Contract: needs matplotlib; no display, no pyplot; the style is that of `darts.report`. A figure without data is left
out, with the reason. Lines are means over the seeds; where there are several, and not too many arms, pale bands reach
from the lowest to the highest seed. An arm has one colour, line and marker in all figures.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from darts.bench.report import BASE
from darts.bench.statistics import BenchResults
from darts.evidence.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, Drawn, Missing, draw_all, dress

COLORS = (BLACK, BLUE, ORANGE, GREEN, RED, PINK, SKY, "#882255", "#999933", GREY)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
MARKERS = "os^Dv"
PHASES = {
    "rollout_s": ("rollout", "#332288"),
    "old_log_prob_s": ("old log-probs", "#88CCEE"),
    "update_s": ("actor update", "#44AA99"),
    "weights_s": ("weights to the servers", "#117733"),
    "other_s": ("other", "#DDDDDD"),
}
SMOOTH = 5
"""Steps of the running mean."""
MOST_BANDS = 8
"""Arms; with more there are no bands."""


def write(bench_results: BenchResults, bench_folder: Path) -> list[Drawn]:
    """Draws into the folder, as `seconds.png` and so on; returns what was drawn."""
    bench_folder.mkdir(parents=True, exist_ok=True)
    drawn_figures = draw_all(FIGURES, bench_results)
    for bench_figure in drawn_figures:
        if bench_figure.png is not None:
            (bench_folder / f"{bench_figure.name}.png").write_bytes(bench_figure.png)
    return drawn_figures


def smoothed(seed_values: pd.DataFrame) -> pd.DataFrame:
    """Running means over the steps: of the known values of `SMOOTH` neighbours, fewer at the ends."""
    return seed_values.T.rolling(SMOOTH, center=True, min_periods=1).mean().T


def _look(results: BenchResults, arm: str) -> tuple[str, Any, str]:
    number = results.arms.index(arm)
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)], MARKERS[number % len(MARKERS)]


def _line(
    axes: Axes, results: BenchResults, arm: str, key: str, smooth: bool = True, x: pd.Series | None = None
) -> None:
    """Mean and band of the seeds' values of a field, over steps or x, which is by step; smooth, or with markers."""
    values = results.by_seed(arm, key)
    if values.empty:
        return
    x = values.columns.to_series() if x is None else x
    values = smoothed(values) if smooth else values
    color, dashes, marker = _look(results, arm)
    if len(values) > 1 and len(results.arms) <= MOST_BANDS:
        axes.fill_between(x, values.min(), values.max(), color=color, alpha=0.10, linewidth=0)
    line_look = {"linestyle": dashes, "color": color, "linewidth": 1.8, "marker": "" if smooth else marker}
    axes.plot(x, values.mean(), markersize=4, label=arm, **line_look)


def _require(results: BenchResults, kind: Literal["step", "validation"]) -> None:
    if not any(len(getattr(results, f"{kind}s")(arm)) for arm in results.arms):
        raise Missing(f"no {kind} has been measured.")


def _curves(results: BenchResults, panels: Mapping[str, str], unit: str) -> Figure:
    """A panel for each field, by title, with a line of each arm over the steps."""
    _require(results, "step")
    figure = Figure(figsize=(11 if len(panels) < 3 else 14, 5))
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for arm in results.arms:
            _line(axes, results, arm, key, smooth=key != "mean_length")
        dress(axes, title, unit)
    _legend(figure)
    return figure


def _legend(bench_figure: Figure) -> None:
    """One legend for all panels, below them."""
    line_handles, line_labels = bench_figure.axes[0].get_legend_handles_labels()
    bench_figure.legend(line_handles, line_labels, loc="outside lower center", ncols=min(len(line_labels), 6))


def _seconds(bench_results: BenchResults) -> tuple[Figure, str]:
    bench_figure = _curves(bench_results, {"step_s": "Step", "rollout_s": "Of which rollout"}, "seconds")
    for panel_axes in bench_figure.axes:
        panel_axes.set_ylim(bottom=0)
    return bench_figure, (
        f"An arm wins where its line is below that of {BASE}, and shapes lengths where it falls. Running means "
        f"over {SMOOTH} steps of the mean over seeds; bands: lowest to highest seed."
    )


def _accuracy(results: BenchResults) -> tuple[Figure, str]:
    _require(results, "validation")
    _require(results, "step")
    bench_figure = Figure(figsize=(11, 5))
    left, right = bench_figure.subplots(1, 2, sharey=True)
    for arm in results.arms:
        _line(left, results, arm, "accuracy", smooth=False)
        training_seconds = results.elapsed(arm).reindex(columns=results.by_seed(arm, "accuracy").columns)
        _line(right, results, arm, "accuracy", smooth=False, x=training_seconds.mean())
    goal_accuracy = results.target(BASE)
    if math.isfinite(goal_accuracy):
        for axes in (left, right):
            axes.axhline(goal_accuracy, color=GREY, linewidth=1, linestyle=":")
    dress(left, "Against steps", "validation accuracy")
    dress(right, "Against time", "", x="seconds of training (steps alone, mean over seeds)")
    _legend(bench_figure)
    return bench_figure, (
        f"Left, an arm learns as much from a step as {BASE} where the lines agree; right, it gets there earlier where "
        f"its line is further left. Dotted: {BASE} over the last third. Bands: lowest to highest seed."
    )


def _tradeoff(results: BenchResults) -> tuple[Figure, str]:
    arms = [arm for arm in results.arms if arm != BASE and len(results.steps(arm)) and len(results.validations(arm))]
    if not (arms and len(results.steps(BASE)) and len(results.validations(BASE))):
        raise Missing(f"needs steps and validations of {BASE} and of another arm.")
    bench_figure = Figure(figsize=(11, 5.5))
    axes = bench_figure.subplots()
    axes.axhline(0, color=GREY, linewidth=1, linestyle=":")
    axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
    for arm in arms:
        arm_color, _, arm_marker = _look(results, arm)
        speed = results.speed_up(arm, BASE, last=True).overall
        accuracy_gain = results.accuracy_gain(arm, BASE, last=True).overall
        axes.plot([speed.low, speed.high], [accuracy_gain.value] * 2, color=arm_color, linewidth=1, alpha=0.5)
        axes.plot([speed.value] * 2, [accuracy_gain.low, accuracy_gain.high], color=arm_color, linewidth=1, alpha=0.5)
        axes.plot(speed.value, accuracy_gain.value, marker=arm_marker, color=arm_color, linestyle="", markersize=8)
        axes.annotate(arm, (speed.value, accuracy_gain.value), xytext=(7, 5), textcoords="offset points", fontsize=10)
    axes.margins(x=0.12)
    dress(axes, "What a strategy wins and costs", f"accuracy minus that of {BASE}", x=f"times as fast as {BASE}")
    return bench_figure, (
        f"Over the last third; {BASE} is where the dotted lines cross, better is up and right. Lines: 95 % intervals, "
        "which an arm needs to have above the dotted line to be called better."
    )


def _lengths(results: BenchResults) -> tuple[Figure, str]:
    panels = {"kept_mean": "Mean of the kept", "pool_p99": "99th percentile of all candidates"}
    if any(results.validations(arm)["mean_length"].notna().any() for arm in results.arms):
        panels["mean_length"] = "Mean in validation"
    return _curves(results, panels, "tokens"), (
        "What is kept is a choice by length; what the policy itself has become shows in validation, where nothing is "
        f"chosen or stopped. An aborted candidate counts with the tokens it had. Running means over {SMOOTH} steps."
    )


def _phases(results: BenchResults) -> tuple[Figure, str]:
    _require(results, "step")
    arms = [arm for arm in results.arms if len(results.steps(arm))]
    figure = Figure(figsize=(11, 1.9 + 0.42 * len(arms)))
    axes = figure.subplots()
    floor = np.zeros(len(arms))
    for key, (label, color) in PHASES.items():
        means = np.array([max(results.values(arm, key).mean(), 0.0) for arm in arms])
        axes.barh(arms, means, left=floor, color=color, label=label, height=0.72)
        floor += means
    for place, arm in enumerate(arms):
        speed_up = results.speed_up(arm, BASE).overall.value
        factor = f", {speed_up:.2f}x" if math.isfinite(speed_up) and arm != BASE else ""
        axes.text(floor[place], place, f" {floor[place]:.2f} s{factor}", va="center", fontsize=10)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.16 * floor.max())
    dress(axes, "Where a step's time goes", "", x="seconds, mean over steps and seeds", legend=len(PHASES))
    return figure, (
        f"The factor is how many times faster than {BASE} an arm is, over the steps of both. Log-probs that are "
        "computed during generation are not in the bar of the old log-probs, but may lengthen the rollout."
    )


FIGURES: dict[str, tuple[str, Callable[[BenchResults], tuple[Figure, str]]]] = {
    "seconds": ("Seconds a step", _seconds),
    "accuracy": ("Accuracy", _accuracy),
    "tradeoff": ("Speed and accuracy", _tradeoff),
    "lengths": ("Response length", _lengths),
    "phases": ("Where the time goes", _phases),
}
