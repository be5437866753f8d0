"""The look of all figures: colours, style, a title with labels, PNG out. Needs matplotlib; no display."""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666", "#000000",
)  # fmt: skip

PHASES = {
    "gen": "#332288", "reward": "#CC6677", "old_log_prob": "#88CCEE", "ref": "#DDCC77", "values": "#882255",
    "adv": "#999933", "update_critic": "#AA4499", "update_actor": "#44AA99", "save_checkpoint": "#661100",
    "update_weights": "#117733", "other": "#DDDDDD", "testing": "#888888",
}  # fmt: skip

STYLE: dict[str, Any] = {
    "font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#E4E4E4", "grid.linewidth": 0.7,
    "legend.frameon": False, "legend.fontsize": 10, "legend.handlelength": 1.4, "legend.borderpad": 0.2,
    "legend.columnspacing": 1.2, "figure.dpi": 130, "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
}  # fmt: skip

STEPS = "training step"


class Missing(Exception):
    """The run has no data for a figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A figure as the page shows it; `png` is None where it is left out, and the caption says why."""

    name: str
    title: str
    caption: str
    png: bytes | None


def draw_all(figures: Mapping[str, tuple[str, Callable[..., tuple[Figure, str]]]], *arguments: Any) -> list[Drawn]:
    """Titles and functions by name; the functions get the arguments, and return a figure and its caption."""
    drawn = []
    for name, (title, make_figure) in figures.items():
        png, png_buffer = None, io.BytesIO()
        with rc_context(STYLE):
            try:
                figure, caption_text = make_figure(*arguments)
                figure.savefig(png_buffer, format="png", metadata={"Software": None})
                png = png_buffer.getvalue()
            except Missing as reason:
                caption_text = str(reason)
        drawn.append(Drawn(name=name, title=title, caption=caption_text, png=png))
    return drawn


def dress(axes: Axes, title: str, y: str, x: str = STEPS, legend: int = 0) -> None:
    """Title, labels and, between title and data, a legend of so many columns."""
    num_entries = len(axes.get_legend_handles_labels()[0]) if legend else 0
    axes.set_title(title, pad=6 + 16 * math.ceil(num_entries / max(legend, 1)))
    axes.set(xlabel=x, ylabel=y)
    if num_entries:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=legend, borderaxespad=0)
    if x == STEPS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10], min_n_ticks=1))
