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

from darts.evidence.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PHASES, PINK, RED, SKY, STEPS, Missing, dress
from darts.evidence.trace import INSIDE_STEP
from darts.report.run import Array, Run, RunStep, first_and_last, tenths

FATES = {
    "kept": BLUE, "kept, truncated": SKY, "kept, cut": GREEN, "dropped": ORANGE, "dropped, truncated": RED,
    "aborted": PINK, "lost": BLACK,
}  # fmt: skip
SHARES = LinearSegmentedColormap.from_list("shares", ["#DCE9F5", "#6BAED6", "#08306B"])
SMOOTH_FROM, MAX_COLUMNS, MAX_POINTS, MAX_BARS = 100, 75, 2000, 40
CORRELATIONS = ("darts/history/std_correlation", "std_correlation")  # the first: of prompts that were seen before
TERMS = ("utility", "gain", "time_cost", "time_cost_measured")
UTILITY = {term.replace("_", " "): f"darts/allocation/{term}" for term in TERMS}
Figures = dict[str, tuple[str, Callable[[Run], tuple[Figure, str]]]]
"""Name of a figure -> its title and what draws it, with the sentence that says how to read it."""


# --- parts -----------------------------------------------------------------------------------------------------------


def _numbers(run: Run) -> Array:
    return np.array([step.number for step in run.steps], dtype=float)


def _window(run: Run) -> int:
    return 1 if len(run.steps) < SMOOTH_FROM else 2 * (len(run.steps) // 40) + 1


def plot_line(
    axes: Axes, run: Run, values: Array, color: str, label: str, line_style: str = "-", x: Array | None = None
) -> None:
    """The known values over steps (or x)."""
    is_known = np.isfinite(values)
    if not is_known.any():
        return
    x, values = (_numbers(run) if x is None else x)[is_known], values[is_known]
    window_size = min(_window(run), len(values))
    if window_size > 1:
        axes.plot(x, values, color=color, alpha=0.25, linewidth=0.7)
        window_ones = np.ones(window_size)
        values = np.convolve(values, window_ones, "same") / np.convolve(np.ones(len(values)), window_ones, "same")
    marker = "o" if len(values) <= 40 else ""
    axes.plot(x, values, line_style, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=label)


def plot_lines(axes: Axes, run: Run, metrics: dict[str, str], colors: Sequence[str], scale: float = 1) -> None:
    """Metrics, by their labels, over the steps; the last is dashed."""
    line_styles = ["-"] * (len(metrics) - 1) + ["--"]
    for (label, key), color, line_style in zip(metrics.items(), colors, line_styles, strict=True):
        plot_line(axes, run, scale * run.series(key), color, label, line_style)


def _columns(run: Run) -> tuple[Array, list[Array]]:
    """Edges of the columns on the axis of steps, and the positions of the steps in each."""
    step_numbers = _numbers(run)
    groups = np.array_split(np.arange(len(step_numbers)), min(len(step_numbers), MAX_COLUMNS))
    return np.array([*(step_numbers[group[0]] - 0.5 for group in groups), step_numbers[-1] + 0.5]), groups


def plot_stack(axes: Axes, run: Run, parts: dict[str, Array], colors: dict[str, str]) -> None:
    """Columns of parts on top of each other; steps whose parts are NaN are not in the means."""
    column_edges, groups = _columns(run)
    floor_heights = np.zeros(len(groups))
    for name, values in parts.items():
        known_values = [values[group][np.isfinite(values[group])] for group in groups]
        top_heights = floor_heights + np.array([column.mean() if len(column) else 0 for column in known_values])
        axes.stairs(top_heights, column_edges, baseline=floor_heights, fill=True, color=colors[name], label=name)
        floor_heights = top_heights
    axes.set(xlim=(column_edges[0], column_edges[-1]), ylim=(0, None))


def _log(axes: Axes, axis_name: str, values: Array, spread_factor: float) -> None:
    """A logarithmic axis with plain numbers, if the values are positive and spread over more than so many times."""
    if values.min() > 0 and values.max() > spread_factor * values.min():
        axes.set(**{f"{axis_name}scale": "log"})
        axis = getattr(axes, f"{axis_name}axis")
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("{x:,g}")
        axis.grid(True, which="minor")


def _ends(steps: Sequence[RunStep]) -> dict[str, Sequence[RunStep]]:
    """The first and last tenth, named; one entry if they are the same step."""
    named_ends = [(f"steps {end[0].number} to {end[-1].number}", end) for end in tenths(steps) if end]
    return {name if len(end) > 1 else f"step {end[0].number}": end for name, end in named_ends}


def how_drawn(run: Run, *parts: str) -> str:
    """What a caption says of its lines and columns in a run with many steps."""
    window_size, column_size = _window(run), math.ceil(len(run.steps) / MAX_COLUMNS)
    on_lines = f" Bold lines are running means over {window_size} steps, pale ones the steps."
    on_columns = f" Columns are means of up to {column_size} steps."
    return on_lines * ("lines" in parts and window_size > 1) + on_columns * ("columns" in parts and column_size > 1)


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
    left_axes, right_axes = figure.subplots(1, 2)
    metrics = {name: f"length/{name}" for name in ("longest", "p99", "p90", "median")}
    metrics["mean of the kept"] = "length/kept"
    plot_lines(left_axes, run, metrics, (RED, ORANGE, GREEN, BLUE, BLACK))
    dress(left_axes, "Over the run", "response length, tokens", legend=3)
    all_values = np.concatenate([run.series(key) for key in metrics.values()])
    _log(left_axes, "y", all_values[np.isfinite(all_values)], 8)
    end_steps = _ends(run.rolled)
    end_lengths = {name: np.concatenate([step.rollout.lengths for step in end]) for name, end in end_steps.items()}
    longest_shown = max(np.percentile(candidate_lengths, 99.5) for candidate_lengths in end_lengths.values())
    num_bars = np.clip(2 * math.sqrt(min(map(len, end_lengths.values()))), 8, MAX_BARS)
    bar_width = math.ceil((longest_shown + 1) / num_bars)
    bin_edges = np.arange(0, longest_shown + bar_width + 1, bar_width) - 0.5
    for (name, candidate_lengths), color in zip(end_lengths.items(), (GREY, BLUE), strict=False):
        mean_length = np.mean([step.values["length/pool"] for step in end_steps[name]])
        bar_counts = np.histogram(np.minimum(candidate_lengths, bin_edges[-1]), bin_edges)[0]
        bar_shares = 100 * bar_counts / bar_counts.sum()
        right_axes.stairs(bar_shares, bin_edges, fill=True, color=color, alpha=0.25)
        right_axes.stairs(bar_shares, bin_edges, color=color, linewidth=1.8, label=f"{name}: mean {mean_length:,.0f}")
        right_axes.axvline(mean_length, color=color, linestyle="--", linewidth=1.2)
    is_cut = max(candidate_lengths.max() for candidate_lengths in end_lengths.values()) > bin_edges[-1]
    dress(
        right_axes, "First against last", "% of the candidates",
        f"response length, tokens (bars of {bar_width}{', the last: or longer' if is_cut else ''})", legend=1,
    )  # fmt: skip
    right_axes.set_xlim(left=min(0, bin_edges[0]))
    caption = (
        "A shrinking tail shows as longest and p99 falling towards the median (left), and as less on the right of the "
        "histogram at the end of the run than at its start (right; dashed: means); an aborted candidate counts with "
        "the tokens it had."
    )
    return figure, caption + how_drawn(run, "lines")


def _budgets(run: Run) -> tuple[Figure, str]:
    _need_rollouts(run)
    known_ends = _ends([step for step in run.rolled if len(step.rollout.std)])
    end_points = {name: np.concatenate([step.rollout.std for step in end]) for name, end in known_ends.items()}
    end_points = {name: rows[:: len(rows) // MAX_POINTS + 1] for name, rows in end_points.items()}
    has_observed = any(np.isfinite(rows[:, 1]).any() for rows in end_points.values())
    panels = {
        _budget_by_std: bool(end_points),
        _budget_map: True,
        _observed_by_predicted: has_observed,
        _correlations: run.has(*CORRELATIONS),
    }
    panels = [draw_panel for draw_panel, has_data in panels.items() if has_data]
    rows, num_columns = (2, 2) if len(panels) > 2 else (1, len(panels))
    figure = Figure(figsize=(11, 4.3 * rows))
    grid = figure.subplots(rows, num_columns, squeeze=False).ravel()
    how_read = [draw_panel(axes, run, end_points) for axes, draw_panel in zip(grid, panels, strict=False)]
    for axes in grid[len(panels) :]:
        axes.remove()
    missing_note = "" if end_points else " No standard deviation was predicted, so budgets are shown alone."
    return figure, _sentence(how_read) + missing_note + how_drawn(run, "lines", "columns")


def _scatter(axes: Axes, end_points: dict[str, Array], y_column: int, jitter: float) -> Array:
    """One column of the points over the predicted std; returns what is drawn, shape [points, 2]."""
    rng, drawn_points = np.random.default_rng(0), [np.zeros((0, 2))]
    for (name, end_rows), color, marker in zip(end_points.items(), (ORANGE, BLUE), "so", strict=False):
        known_points = end_rows[np.isfinite(end_rows[:, y_column])][:, [0, y_column]].astype(float)
        drawn_points.append(known_points)
        y = known_points[:, 1] + rng.uniform(-jitter, jitter, len(known_points))
        size = 28 if len(known_points) < 200 else 10
        axes.scatter(known_points[:, 0], y, s=size, color=color, marker=marker, alpha=0.55, linewidths=0, label=name)
    return np.concatenate(drawn_points)


def _budget_by_std(axes: Axes, _: Run, end_points: dict[str, Array]) -> str:
    _log(axes, "x", _scatter(axes, end_points, 2, 0.25)[:, 0], 20)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, "Budget by predicted spread", "candidates M' (jittered)", "predicted std of length, tokens", legend=2)
    return "budgets rise with the predicted spread of a prompt's lengths where allocation is adaptive"


def _observed_by_predicted(axes: Axes, _: Run, end_points: dict[str, Array]) -> str:
    all_values = _scatter(axes, end_points, 1, 0)
    axis_limits = 0.9 * all_values.min(), 1.1 * all_values.max() + 1e-9
    axes.plot(axis_limits, axis_limits, color=GREY, linewidth=1)
    axes.set(xlim=axis_limits, ylim=axis_limits)
    for axis_name in "xy":
        _log(axes, axis_name, all_values, 10)
    dress(axes, "Observed by predicted spread", "observed std, tokens", "predicted std of length, tokens", legend=2)
    return "predictions are good where the points follow the diagonal"


def _correlations(axes: Axes, run: Run, _: dict[str, Array]) -> str:
    correlations = run.series(next(filter(run.has, CORRELATIONS)))
    plot_line(axes, run, correlations, BLUE, "over the prompts of a step")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_ylim(min(-0.05, np.nanmin(correlations) - 0.05), 1.02)
    dress(axes, "Predicted with observed spread", "correlation", legend=1)
    return "a correlation near 1 says the same of a step"


def _budget_map(axes: Axes, run: Run, _: dict[str, Array]) -> str:
    column_edges, groups = _columns(run)
    budget_counts = [step.rollout.budgets if step.rollout else {} for step in run.steps]
    low, high = (find_end(budget for counts in budget_counts for budget in counts) for find_end in (min, max))
    budgets = np.arange(low, high + 1)
    table = np.array([[counts.get(budget, 0) for budget in budgets] for counts in budget_counts], dtype=float)
    prompts = np.where(table.any(axis=1), table.sum(axis=1), math.nan)
    cells = np.array([table[group].sum(axis=0) / max(table[group].sum(), 1) for group in groups]).T
    mesh = axes.pcolormesh(column_edges, np.arange(low, high + 2) - 0.5, np.where(cells > 0, 100 * cells, math.nan),
                           cmap=SHARES, vmin=0)  # fmt: skip
    axes.figure.colorbar(mesh, ax=axes, label="% of the prompts", pad=0.02).outline.set_visible(False)
    plot_line(axes, run, table @ budgets / prompts, RED, "mean")
    axes.set(xlim=(column_edges[0], column_edges[-1]), ylim=(low - 1, high + 1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    dress(axes, "Budgets over the run", "candidates M'", legend=1)
    return "dark cells are the budgets of most prompts, the line is their mean"


def _selection(run: Run) -> tuple[Figure, str]:
    _need_rollouts(run)
    figure, has_rewards = Figure(figsize=(11, 7.4)), run.has("darts/reward/pool_mean", "darts/reward/kept_mean")
    grid = figure.subplot_mosaic([["length", "reward" if has_rewards else "length"], ["fate", "fate"]])
    metrics, colors = {name: f"length/{name}" for name in ("pool", "kept")}, (ORANGE, BLUE)
    plot_lines(grid["length"], run, metrics, colors)
    dress(grid["length"], "Mean response length", "tokens", legend=2)
    if has_rewards:
        metrics = {name: f"darts/reward/{name}_mean" for name in metrics}
        plot_lines(grid["reward"], run, metrics, colors)
        dress(grid["reward"], "Mean reward", "reward", legend=2)
    counts = np.array([step.rollout.fates if step.rollout else np.full(len(FATES), math.nan) for step in run.steps]).T
    plot_stack(grid["fate"], run, {name: row for name, row in zip(FATES, counts, strict=True) if np.nansum(row)}, FATES)
    dress(grid["fate"], "What became of the candidates", "candidates a step", legend=len(FATES))
    caption = (
        "The gap between kept and pool is the bias of selection (top), and all that is not kept is what redundancy "
        "costs (bottom)."
    )
    if not run.has("darts/reward/pool_mean"):
        caption += " The pool has no reward: not all that ended were scored (darts.reward.pool=false?)."
    return figure, caption + how_drawn(run, "lines", "columns")


def _time(run: Run) -> tuple[Figure, str]:
    if not run.has("timing_s/step"):
        raise Missing("no step has timing_s/step.")
    step_s = run.series("timing_s/step")
    is_timed = np.isfinite(step_s)
    measured = [name for name in (*INSIDE_STEP, "testing") if run.has(f"timing_s/{name}")]
    parts = {name: np.nan_to_num(run.series(f"timing_s/{name}")) for name in measured}
    testing_s = parts.pop("testing", None)
    parts["other"] = np.maximum(np.nan_to_num(step_s) - sum(parts.values()), 0)
    if testing_s is not None:
        parts["testing"] = testing_s
    figure = Figure(figsize=(11, 4.6))
    left_axes, right_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    plot_stack(left_axes, run, {name: np.where(is_timed, values, math.nan) for name, values in parts.items()}, PHASES)
    dress(left_axes, "Seconds of a step", "seconds")
    means, whole = {name: values[is_timed].mean() for name, values in parts.items()}, step_s[is_timed].mean()
    bar_rows = right_axes.barh(list(means), list(means.values()), color=[PHASES[name] for name in means])
    labels = [f"{mean:.2f}" + (f" ({mean / whole:.0%})" if name != "testing" else "") for name, mean in means.items()]
    right_axes.bar_label(bar_rows, labels, padding=4, fontsize=10)
    right_axes.set_xlim(0, 1.35 * max(means.values()))
    right_axes.grid(False)
    right_axes.tick_params(axis="y", length=0)
    dress(right_axes, "Mean of all steps", "", f"seconds (share of a step of {whole:.1f} s)")
    caption = (
        "A column is what a step took, stacked in the order and colours of the bars on the right: DARTS acts on gen, "
        "the rollout, and other is what verl does not name."
    )
    if testing_s is not None:
        caption += " Testing (validation) is not part of the step's own time and stands on top of it."
    return figure, caption + how_drawn(run, "columns")


def _reward(run: Run) -> tuple[Figure, str]:
    reward_key, validation_keys, hours = run.reward(), run.validations(), run.hours()
    if not run.has(reward_key, *validation_keys):
        raise Missing("no step has a reward (critic/rewards/mean) or a validation (val-core/*).")
    x_scales = {STEPS: _numbers(run)}
    if math.isfinite(hours[-1]):
        x_scales |= {"hours of training": hours} if hours[-1] >= 2 else {"minutes of training": 60 * hours}
    figure = Figure(figsize=(11, 4.8))
    grid = figure.subplots(1, len(x_scales), sharey=True, squeeze=False)[0]
    for axes, (x_label, x) in zip(grid, x_scales.items(), strict=True):
        plot_line(axes, run, run.series(reward_key), BLUE, f"{reward_key} (training)", x=x)
        for key, color, point_marker in zip(validation_keys, (RED, GREEN, ORANGE, PINK, BLACK), "sD^vP", strict=False):
            is_known = np.isfinite(points := run.series(key))
            line_style, size = f"{point_marker}:" if is_known.sum() <= 100 else "-", 5 if is_known.sum() <= 20 else 3.5
            axes.plot(x[is_known], points[is_known], line_style, markersize=size, color=color, linewidth=1.2, label=key)
        dress(axes, "", ("reward or score" if validation_keys else "reward") if axes is grid[0] else "", x_label)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    caption = "Over steps the reward shows what a step teaches, over time (no validation, no gaps) what an hour does."
    if len(validation_keys) > 5:
        caption += f" {len(validation_keys) - 5} more validation metrics are not shown."
    return figure, caption + how_drawn(run, "lines")


def _cost(run: Run) -> tuple[Figure, str]:
    has_latency, has_utility = run.has("darts/latency/predicted_s"), run.has(*UTILITY.values())
    if not has_latency and not has_utility:
        raise Missing("no step has darts/latency/predicted_s or darts/allocation/utility (not in adaptive mode?).")
    figure, how_read = Figure(figsize=(11, 4.4)), []
    grid = figure.subplots(1, has_latency + has_utility, squeeze=False)[0]
    if has_latency:
        metrics = {"measured": "darts/rollout/seconds", "predicted": "darts/latency/predicted_s"}
        plot_lines(grid[0], run, metrics, (ORANGE, BLUE))
        dress(grid[0], "Duration of the rollout", "seconds", legend=2)
        grid[0].set_ylim(bottom=0)
        end_ratio = first_and_last(run.series("darts/latency/predicted_s") / run.series("darts/rollout/seconds"))[1]
        ratio_text = f" (predicted / measured is {end_ratio:.2f} at the end)" if math.isfinite(end_ratio) else ""
        how_read.append(f"the cost model is right where the lines meet{ratio_text}")
    if has_utility:
        plot_lines(grid[-1], run, UTILITY, (BLUE, GREEN, RED, ORANGE))
        dress(grid[-1], "Utility of the mean budget", "ratio", legend=4 if has_latency else 2)
        how_read.append(
            "utility is gain minus weighted time cost; the mean budget with the most is chosen, unless it is a setting"
        )
    return figure, _sentence(how_read) + how_drawn(run, "lines")


FIGURES: Figures = {
    "lengths": ("Response length", _lengths),
    "budgets": ("Budgets and spread", _budgets),
    "selection": ("Kept against pool", _selection),
    "reward": ("Reward", _reward),
    "cost": ("Cost model and utility", _cost),
    "time": ("Where the time goes", _time),
}
"""What the page begins with; the figures of `darts.report.timeline` follow."""
