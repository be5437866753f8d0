"""The figures of `darts.report`: a run in, PNG pictures with a title and a caption out.

Contract: needs matplotlib; no display, no pyplot. Each function of a table like `FIGURES` gives a figure and the
sentence that says how to read it, or raises `Missing` with the reason. The colours (Okabe and Ito's, Tol's) are told
apart by the colour-blind. From `SMOOTH_FROM` steps on a line is a running mean over the pale values; of more than
`MAX_COLUMNS` steps a column is the mean of several. Captions say so.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from darts.evidence.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PHASES,
    PINK,
    RED,
    SKY,
    STEPS,
    Missing,
    dress,
)
from darts.evidence.trace import INSIDE_STEP
from darts.report.run import UTILITY, Array, Run, RunStep, first_and_last, tenths

FATES = {
    "kept": BLUE, "kept, truncated": SKY, "dropped": ORANGE, "dropped, truncated": RED, "aborted": PINK, "lost": BLACK,
}  # fmt: skip
SHARES = LinearSegmentedColormap.from_list("shares", ["#DCE9F5", "#6BAED6", "#08306B"])
SMOOTH_FROM, MAX_COLUMNS, MAX_POINTS, MAX_BARS = 100, 75, 2000, 40
Figures = dict[str, tuple[str, Callable[[Run], tuple[Figure, str]]]]
"""Name of a figure -> its title and what draws it, with the sentence that says how to read it."""


# --- parts -----------------------------------------------------------------------------------------------------------


def _numbers(run: Run) -> Array:
    return np.array([step.number for step in run.steps], dtype=float)


def _window(run: Run) -> int:
    return 1 if len(run.steps) < SMOOTH_FROM else 2 * (len(run.steps) // 40) + 1


def plot_line(
    axes: Axes, run: Run, values: Array, color: str, label: str, form: str = "-", x: Array | None = None
) -> None:
    """The known values over steps (or x)."""
    known = np.isfinite(values)
    if not known.any():
        return
    x, values = (_numbers(run) if x is None else x)[known], values[known]
    window = min(_window(run), len(values))
    if window > 1:
        axes.plot(x, values, color=color, alpha=0.25, linewidth=0.7)
        ones = np.ones(window)
        values = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    marker = "o" if len(values) <= 40 else ""
    axes.plot(x, values, form, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=label)


def _columns(run: Run) -> tuple[Array, list[Array]]:
    """Edges of the columns on the axis of steps, and the positions of the steps in each."""
    numbers = _numbers(run)
    groups = np.array_split(np.arange(len(numbers)), min(len(numbers), MAX_COLUMNS))
    return np.array([*(numbers[group[0]] - 0.5 for group in groups), numbers[-1] + 0.5]), groups


def plot_stack(axes: Axes, run: Run, parts: dict[str, Array], colors: dict[str, str]) -> None:
    """Columns of parts on top of each other; steps whose parts are NaN are not in the means."""
    edges, groups = _columns(run)
    floor = np.zeros(len(groups))
    for name, values in parts.items():
        known = [values[group][np.isfinite(values[group])] for group in groups]
        top = floor + np.array([some.mean() if len(some) else 0 for some in known])
        axes.stairs(top, edges, baseline=floor, fill=True, color=colors[name], label=name)
        floor = top
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None))


def _log(axes: Axes, which: str, values: Array, factor: float) -> None:
    """A logarithmic axis with plain numbers, if the values are positive and spread over more than so many times."""
    if values.min() > 0 and values.max() > factor * values.min():
        axes.set(**{f"{which}scale": "log"})
        axis = getattr(axes, f"{which}axis")
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("{x:,g}")
        axis.grid(True, which="minor")


def _ends(steps: Sequence[RunStep]) -> dict[str, Sequence[RunStep]]:
    """The first and last tenth, named; one entry if they are the same step."""
    both = [(f"steps {some[0].number} to {some[-1].number}", some) for some in tenths(steps) if some]
    return {name if len(some) > 1 else f"step {some[0].number}": some for name, some in both}


def how_drawn(run: Run, *parts: str) -> str:
    """What a caption says of its lines and columns in a run with many steps."""
    window, size = _window(run), math.ceil(len(run.steps) / MAX_COLUMNS)
    lines = f" Bold lines are running means over {window} steps, pale ones the steps."
    columns = f" Columns are means of up to {size} steps."
    return lines * ("lines" in parts and window > 1) + columns * ("columns" in parts and size > 1)


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _need_rollouts(run: Run) -> None:
    if not run.rolled:
        raise Missing("no step has a DARTS rollout (was darts.enable=false?).")


# --- figures ---------------------------------------------------------------------------------------------------------


def _lengths(run: Run) -> tuple[Figure, str]:
    _need_rollouts(run)
    figure = Figure(figsize=(11, 4.6))
    left, right = figure.subplots(1, 2)
    lines = {
        "longest": ("longest", RED), "p99": ("p99", ORANGE), "p90": ("p90", GREEN), "median": ("median", BLUE),
        "kept": ("mean of the kept", BLACK),
    }  # fmt: skip
    for name, (label, color) in lines.items():
        plot_line(left, run, run.series(f"length/{name}"), color, label, "--" if name == "kept" else "-")
    values = np.concatenate([run.series(f"length/{name}") for name in lines])
    _log(left, "y", values[np.isfinite(values)], 8)
    dress(left, "Over the run", "response length, tokens", legend=3)

    ends = _ends(run.rolled)
    lengths = {name: np.concatenate([step.rollout.lengths for step in some]) for name, some in ends.items()}
    most = max(np.percentile(length, 99.5) for length in lengths.values())
    bars = np.clip(2 * math.sqrt(min(map(len, lengths.values()))), 8, MAX_BARS)
    width = math.ceil((most + 1) / bars)
    bins = np.arange(0, most + width + 1, width) - 0.5
    for (name, length), color in zip(lengths.items(), (GREY, BLUE), strict=False):
        mean = np.mean([step.values["length/pool"] for step in ends[name]])
        counts = np.histogram(np.minimum(length, bins[-1]), bins)[0]
        share = 100 * counts / counts.sum()
        right.stairs(share, bins, fill=True, color=color, alpha=0.25)
        right.stairs(share, bins, color=color, linewidth=1.8, label=f"{name}: mean {mean:,.0f}")
        right.axvline(mean, color=color, linestyle="--", linewidth=1.2)
    cut = max(length.max() for length in lengths.values()) > bins[-1]
    dress(
        right, "First against last", "% of the candidates",
        f"response length, tokens (bars of {width}{', the last: or longer' if cut else ''})", legend=1,
    )  # fmt: skip
    right.set_xlim(left=min(0, bins[0]))
    caption = (
        "A shrinking tail shows as longest and p99 falling towards the median (left), and as less on the right of the "
        "histogram at the end of the run than at its start (right; dashed: means); an aborted candidate counts with "
        "the tokens it had."
    )
    return figure, caption + how_drawn(run, "lines")


def _budgets(run: Run) -> tuple[Figure, str]:
    _need_rollouts(run)
    known = _ends([step for step in run.rolled if len(step.rollout.std)])
    points = {name: np.concatenate([step.rollout.std for step in some]) for name, some in known.items()}
    points = {name: rows[:: len(rows) // MAX_POINTS + 1] for name, rows in points.items()}
    correlation = run.series("darts/history/std_correlation")  # of the prompts that were seen before
    if not np.isfinite(correlation).any():
        correlation = run.series("std_correlation")
    panels: list[tuple[str, Callable[[Axes], None]]] = [
        ("dark cells are the budgets of most prompts, the line is their mean", lambda axes: _budget_map(axes, run))
    ]
    if points:
        said = "budgets rise with the predicted spread of a prompt's lengths where allocation is adaptive"
        panels.insert(0, (said, lambda axes: _budget_by_std(axes, points)))
    if any(np.isfinite(rows[:, 1]).any() for rows in points.values()):
        said = "predictions are good where the points follow the diagonal"
        panels.append((said, lambda axes: _observed_by_predicted(axes, points)))
    if np.isfinite(correlation).any():
        panels.append(
            ("a correlation near 1 says the same of a step", lambda axes: _correlations(axes, run, correlation))
        )
    rows, columns = (2, 2) if len(panels) > 2 else (1, len(panels))
    figure = Figure(figsize=(11, 4.3 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (_, panel) in zip(grid, panels, strict=False):
        panel(axes)
    for axes in grid[len(panels) :]:
        axes.remove()
    note = "" if points else " No standard deviation was predicted, so budgets are shown alone."
    return figure, _sentence([said for said, _ in panels]) + note + how_drawn(run, "lines", "columns")


def _scatter(axes: Axes, points: dict[str, Array], column: int, jitter: float) -> Array:
    """One column of the points over the predicted std; returns what is drawn, shape [points, 2]."""
    rng, drawn = np.random.default_rng(0), [np.zeros((0, 2))]
    for (name, rows), color, marker in zip(points.items(), (ORANGE, BLUE), "so", strict=False):
        some = rows[np.isfinite(rows[:, column])][:, [0, column]].astype(float)
        drawn.append(some)
        y = some[:, 1] + rng.uniform(-jitter, jitter, len(some))
        size = 28 if len(some) < 200 else 10
        axes.scatter(some[:, 0], y, s=size, color=color, marker=marker, alpha=0.55, linewidths=0, label=name)
    return np.concatenate(drawn)


def _budget_by_std(axes: Axes, points: dict[str, Array]) -> None:
    _log(axes, "x", _scatter(axes, points, 2, 0.25)[:, 0], 20)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, "Budget by predicted spread", "candidates M' (jittered)", "predicted std of length, tokens", legend=2)


def _observed_by_predicted(axes: Axes, points: dict[str, Array]) -> None:
    values = _scatter(axes, points, 1, 0)
    limits = 0.9 * values.min(), 1.1 * values.max() + 1e-9
    axes.plot(limits, limits, color=GREY, linewidth=1)
    axes.set(xlim=limits, ylim=limits)
    for which in "xy":
        _log(axes, which, values, 10)
    dress(axes, "Observed by predicted spread", "observed std, tokens", "predicted std of length, tokens", legend=2)


def _correlations(axes: Axes, run: Run, values: Array) -> None:
    plot_line(axes, run, values, BLUE, "over the prompts of a step")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_ylim(min(-0.05, np.nanmin(values) - 0.05), 1.02)
    dress(axes, "Predicted with observed spread", "correlation", legend=1)


def _budget_map(axes: Axes, run: Run) -> None:
    edges, groups = _columns(run)
    counts = [step.rollout.budgets if step.rollout else {} for step in run.steps]
    low, high = (function(budget for some in counts for budget in some) for function in (min, max))
    table = np.array([[some.get(budget, 0) for budget in range(low, high + 1)] for some in counts], dtype=float)
    prompts = np.where(table.any(axis=1), table.sum(axis=1), math.nan)
    cells = np.array([table[group].sum(axis=0) / max(table[group].sum(), 1) for group in groups]).T
    mesh = axes.pcolormesh(edges, np.arange(low, high + 2) - 0.5, np.where(cells > 0, 100 * cells, math.nan),
                           cmap=SHARES, vmin=0)  # fmt: skip
    axes.figure.colorbar(mesh, ax=axes, label="% of the prompts", pad=0.02).outline.set_visible(False)
    plot_line(axes, run, table @ np.arange(low, high + 1) / prompts, RED, "mean")
    axes.set(xlim=(edges[0], edges[-1]), ylim=(low - 1, high + 1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    dress(axes, "Budgets over the run", "candidates M'", legend=1)


def _selection(run: Run) -> tuple[Figure, str]:
    _need_rollouts(run)
    rewards = {name: run.series(f"darts/reward/{name}_mean") for name in ("pool", "kept")}
    rewards = {name: values for name, values in rewards.items() if np.isfinite(values).any()}
    figure = Figure(figsize=(11, 7.4))
    grid = figure.subplot_mosaic([["length", "reward" if rewards else "length"], ["fate", "fate"]])
    for name, color, form in (("pool", ORANGE, "-"), ("kept", BLUE, "--")):
        plot_line(grid["length"], run, run.series(f"length/{name}"), color, name, form)
        if name in rewards:
            plot_line(grid["reward"], run, rewards[name], color, name, form)
    dress(grid["length"], "Mean response length", "tokens", legend=2)
    if rewards:
        dress(grid["reward"], "Mean reward", "reward", legend=2)
    counts = np.array([step.rollout.fates if step.rollout else np.full(len(FATES), math.nan) for step in run.steps]).T
    plot_stack(grid["fate"], run, {name: row for name, row in zip(FATES, counts, strict=True) if np.nansum(row)}, FATES)
    dress(grid["fate"], "What became of the candidates", "candidates a step", legend=6)
    caption = (
        "The gap between kept and pool is the bias of selection (top), and all that is not kept is what redundancy "
        "costs (bottom)."
    )
    if "pool" not in rewards:
        caption += " The pool has no reward: not all that ended were scored (darts.reward.pool=false?)."
    return figure, caption + how_drawn(run, "lines", "columns")


def _time(run: Run) -> tuple[Figure, str]:
    step = run.series("timing_s/step")
    timed = np.isfinite(step)
    if not timed.any():
        raise Missing("no step has timing_s/step.")
    measured = {name: run.series(f"timing_s/{name}") for name in (*INSIDE_STEP, "testing")}
    parts = {name: np.nan_to_num(values) for name, values in measured.items() if np.isfinite(values).any()}
    testing = parts.pop("testing", None)
    parts["other"] = np.maximum(np.nan_to_num(step) - sum(parts.values()), 0)
    if testing is not None:
        parts["testing"] = testing
    figure = Figure(figsize=(11, 4.6))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    plot_stack(left, run, {name: np.where(timed, values, math.nan) for name, values in parts.items()}, PHASES)
    dress(left, "Seconds of a step", "seconds")
    means, whole = {name: values[timed].mean() for name, values in parts.items()}, step[timed].mean()
    bars = right.barh(list(means), list(means.values()), color=[PHASES[name] for name in means])
    labels = [f"{mean:.2f}" + (f" ({mean / whole:.0%})" if name != "testing" else "") for name, mean in means.items()]
    right.bar_label(bars, labels, padding=4, fontsize=10)
    right.set_xlim(0, 1.35 * max(means.values()))
    right.grid(False)
    right.tick_params(axis="y", length=0)
    dress(right, "Mean of all steps", "", f"seconds (share of a step of {whole:.1f} s)")
    caption = (
        "A column is what a step took, stacked in the order and colours of the bars on the right: DARTS acts on gen, "
        "the rollout, and other is what verl does not name."
    )
    if testing is not None:
        caption += " Testing (validation) is not part of the step's own time and stands on top of it."
    return figure, caption + how_drawn(run, "columns")


def _reward(run: Run) -> tuple[Figure, str]:
    (name, values), keys, hours = run.reward(), run.validations(), run.hours()
    if not np.isfinite(values).any() and not keys:
        raise Missing("no step has a reward (critic/rewards/mean) or a validation (val-core/*).")
    scales = {STEPS: _numbers(run)}
    if math.isfinite(hours[-1]):
        scales |= {"hours of training": hours} if hours[-1] >= 2 else {"minutes of training": 60 * hours}
    figure = Figure(figsize=(11, 4.8))
    grid = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for axes, (label, x) in zip(grid, scales.items(), strict=True):
        if np.isfinite(values).any():
            plot_line(axes, run, values, BLUE, f"{name} (training)", x=x)
        for key, color, marker in zip(keys, (RED, GREEN, ORANGE, PINK, BLACK), "sD^vP", strict=False):
            known = np.isfinite(points := run.series(key))
            form, size = f"{marker}:" if known.sum() <= 100 else "-", 5 if known.sum() <= 20 else 3.5
            axes.plot(x[known], points[known], form, markersize=size, color=color, linewidth=1.2, label=key)
        dress(axes, "", ("reward or score" if keys else "reward") if axes is grid[0] else "", label)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    caption = "Over steps the reward shows what a step teaches, over time (no validation, no gaps) what an hour does."
    if len(keys) > 5:
        caption += f" {len(keys) - 5} more validation metrics are not shown."
    return figure, caption + how_drawn(run, "lines")


def _cost(run: Run) -> tuple[Figure, str]:
    predicted, measured = run.series("darts/latency/predicted_s"), run.series("darts/rollout/seconds")
    terms = {key.rpartition("/")[2].replace("_", " "): run.series(key) for key in UTILITY}
    terms = {name: values for name, values in terms.items() if np.isfinite(values).any()}
    latency = bool(np.isfinite(predicted).any())
    if not latency and not terms:
        raise Missing("no step has darts/latency/predicted_s or darts/allocation/utility (not in adaptive mode?).")
    figure, said = Figure(figsize=(11, 4.4)), []
    grid = list(figure.subplots(1, latency + bool(terms), squeeze=False)[0])
    if latency:
        axes = grid.pop(0)
        plot_line(axes, run, measured, ORANGE, "measured")
        plot_line(axes, run, predicted, BLUE, "predicted", "--")
        axes.set_ylim(bottom=0)
        dress(axes, "Duration of the rollout", "seconds", legend=2)
        ratio = first_and_last(predicted / measured)[1]
        text = f" (predicted / measured is {ratio:.2f} at the end)" if math.isfinite(ratio) else ""
        said.append(f"the cost model is right where the lines meet{text}")
    if terms:
        for (name, values), color in zip(terms.items(), (BLUE, GREEN, RED, ORANGE), strict=False):
            plot_line(grid[0], run, values, color, name, "--" if "measured" in name else "-")
        dress(grid[0], "Utility of the mean budget", "ratio", legend=4 if latency else 2)
        said.append(
            "utility is gain minus weighted time cost; the mean budget with the most is chosen, unless it is a setting"
        )
    return figure, _sentence(said) + how_drawn(run, "lines")


FIGURES: Figures = {
    "lengths": ("Response length", _lengths),
    "budgets": ("Budgets and spread", _budgets),
    "selection": ("Kept against pool", _selection),
    "reward": ("Reward", _reward),
    "cost": ("Cost model and utility", _cost),
    "time": ("Where the time goes", _time),
}
"""What the page begins with; the figures of `darts.report.timeline` follow."""
