"""The figure of a comparison: speed-up over GPUs, and where a step's seconds go. Needs matplotlib; no display."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from darts.evidence.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE, dress
from darts.simulation.comparison import FREE_ORACLE, ORACLE, PLAIN, ReplaySummary

COLORS = (BLUE, ORANGE, GREEN, RED, PINK, SKY)
PHASES = {"rollout": "#332288", "log_prob": "#88CCEE", "update": "#44AA99", "sync": "#117733", "other": "#DDDDDD"}
DODGE = 0.03
"""Between the points of strategies at the same number of GPUs, as a share of that number: intervals stay readable."""


def short(name: str) -> str:
    """A strategy's name for a legend: of its settings the last part alone, two in a line."""
    strategy, _, settings = name.partition(":")
    setting_pairs = [setting.partition("=") for setting in settings.split(",") if setting]
    short_settings = [f"{key.rpartition('.')[2]}={value}" for key, _, value in setting_pairs]
    setting_lines = [", ".join(short_settings[first : first + 2]) for first in range(0, len(short_settings), 2)]
    return "\n".join([strategy.rpartition(".")[2], *setting_lines])


def draw(summaries: Sequence[ReplaySummary], title: str, to: Path) -> None:
    """Writes the PNG; a note in the title says where a model of shaping was used."""
    names = list(dict.fromkeys(row.name for row in summaries))
    if any(row.model for row in summaries):
        title += " (MODEL of shaping: " + ", ".join(dict.fromkeys(row.name for row in summaries if row.model)) + ")"
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 4.5 + 0.3 * sum(short(name).count("\n") + 1 for name in names) - 0.1 * len(names)))
        left_axes, right_axes = figure.subplots(1, 2)
        _speed_ups(left_axes, summaries, names)
        _seconds(right_axes, summaries, names)
        figure.legend(*left_axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(to, format="png", metadata={"Software": None})


def _speed_ups(axes: Axes, summaries: Sequence[ReplaySummary], names: Sequence[str]) -> None:
    gpu_counts = sorted({row.gpus for row in summaries})
    strategy_names = [name for name in names if name not in (PLAIN, ORACLE, FREE_ORACLE)]
    for name_place, name in enumerate(strategy_names):
        points = sorted((row for row in summaries if row.name == name), key=lambda row: row.gpus)
        estimates = [row.speed_up for row in points]
        ends = [[mean.value - mean.low for mean in estimates], [mean.high - mean.value for mean in estimates]]
        x = [row.gpus * (1 + DODGE * (name_place - (len(strategy_names) - 1) / 2)) for row in points]
        color = COLORS[name_place % len(COLORS)]
        y = [mean.value for mean in estimates]
        line_form = "o-" if name_place < len(COLORS) else "s--"
        axes.errorbar(x, y, ends, fmt=line_form, color=color, markersize=4, capsize=2, label=short(name), linewidth=1.6)
    for name, line_form in ((ORACLE, "^:"), (FREE_ORACLE, "v:")):
        oracle_rows = sorted((row for row in summaries if row.name == name), key=lambda row: row.gpus)
        x, y = [row.gpus for row in oracle_rows], [row.speed_up.value for row in oracle_rows]
        axes.plot(x, y, line_form, color=BLACK, markersize=5, label=name)
    axes.axhline(1, color=GREY, linewidth=1, label="plain verl")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(gpu_counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="GPUs", ylabel="speed-up of a step over plain verl", ylim=(0, None))
    axes.set_title("Speed-up, 95 % intervals over steps")


def _seconds(axes: Axes, summaries: Sequence[ReplaySummary], names: Sequence[str]) -> None:
    gpu_counts = sorted({row.gpus for row in summaries})
    shown_gpus = gpu_counts[len(gpu_counts) // 2]
    rows_by_name = {row.name: row for row in summaries if row.gpus == shown_gpus}
    shown_names = [name for name in names if name in rows_by_name][::-1]
    labels = [short(name) for name in shown_names]
    bar_starts = [0.0] * len(labels)
    for phase, phase_color in PHASES.items():
        bar_widths = [rows_by_name[name].phases[phase] for name in shown_names]
        axes.barh(labels, bar_widths, left=bar_starts, color=phase_color, label=phase.replace("_", "-"), height=0.7)
        bar_starts = [bar_start + bar_width for bar_start, bar_width in zip(bar_starts, bar_widths, strict=True)]
    dress(axes, "Where the seconds go", "", f"seconds a step, {shown_gpus:,} GPUs", legend=4)
    axes.grid(axis="y", visible=False)
