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
    pairs = [setting.partition("=") for setting in settings.split(",") if setting]
    parts = [f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs]
    lines = [", ".join(parts[first : first + 2]) for first in range(0, len(parts), 2)]
    return "\n".join([strategy.rpartition(".")[2], *lines])


def draw(summaries: Sequence[ReplaySummary], title: str, to: Path) -> None:
    """Writes the PNG; a note in the title says where a model of shaping was used."""
    names = list(dict.fromkeys(row.name for row in summaries))
    if any(row.model for row in summaries):
        title += " (MODEL of shaping: " + ", ".join(dict.fromkeys(row.name for row in summaries if row.model)) + ")"
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 4.5 + 0.3 * sum(short(name).count("\n") + 1 for name in names) - 0.1 * len(names)))
        left, right = figure.subplots(1, 2)
        _speed_ups(left, summaries, names)
        _seconds(right, summaries, names)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(to, format="png", metadata={"Software": None})


def _speed_ups(axes: Axes, summaries: Sequence[ReplaySummary], names: Sequence[str]) -> None:
    gpus = sorted({row.gpus for row in summaries})
    others = [name for name in names if name not in (PLAIN, ORACLE, FREE_ORACLE)]
    for place, name in enumerate(others):
        own = sorted((row for row in summaries if row.name == name), key=lambda row: row.gpus)
        ends = [[r.speed_up.value - r.speed_up.low for r in own], [r.speed_up.high - r.speed_up.value for r in own]]
        x = [row.gpus * (1 + DODGE * (place - (len(others) - 1) / 2)) for row in own]
        color = COLORS[place % len(COLORS)]
        y = [row.speed_up.value for row in own]
        form = "o-" if place < len(COLORS) else "s--"
        axes.errorbar(x, y, ends, fmt=form, color=color, markersize=4, capsize=2, label=short(name), linewidth=1.6)
    for name, form in ((ORACLE, "^:"), (FREE_ORACLE, "v:")):
        best = sorted((row for row in summaries if row.name == name), key=lambda row: row.gpus)
        x, y = [row.gpus for row in best], [row.speed_up.value for row in best]
        axes.plot(x, y, form, color=BLACK, markersize=5, label=name)
    axes.axhline(1, color=GREY, linewidth=1, label="plain verl")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(gpus))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="GPUs", ylabel="speed-up of a step over plain verl", ylim=(0, None))
    axes.set_title("Speed-up, 95 % intervals over steps")


def _seconds(axes: Axes, summaries: Sequence[ReplaySummary], names: Sequence[str]) -> None:
    gpus = sorted({row.gpus for row in summaries})
    shown = gpus[len(gpus) // 2]
    rows = {row.name: row for row in summaries if row.gpus == shown}
    shown_names = [name for name in names if name in rows][::-1]
    labels = [short(name) for name in shown_names]
    left = [0.0] * len(labels)
    for phase, color in PHASES.items():
        widths = [rows[name].phases[phase] for name in shown_names]
        axes.barh(labels, widths, left=left, color=color, label=phase.replace("_", "-"), height=0.7)
        left = [start + more for start, more in zip(left, widths, strict=True)]
    dress(axes, "Where the seconds go", "", f"seconds a step, {shown:,} GPUs", legend=4)
    axes.grid(axis="y", visible=False)
