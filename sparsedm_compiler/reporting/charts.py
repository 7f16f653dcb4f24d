"""Training curves: losses, learning rate and mask flips of several runs in one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..fileio import replace_atomically
from .run_log_format import HeldOutEntry, LogEntry, StepEntry

WINDOWS = 30
"""The moving average of a training loss spans this fraction of its points, one thirtieth."""
DPI = 130
LEGEND = 128
"""Characters that fit into a row of the legend; the line before a name takes as much as 8."""
SPAN = 20
"""The ratio of largest to smallest loss from which on the scale is logarithmic."""

POINTS = 3
"""Values that make a curve, at least; fewer are not drawn."""


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a chart: ``ink`` for text and frame, the grid, ``paper`` behind, one per run."""

    ink: str
    grid: str
    paper: str
    runs: tuple[str, ...]


LIGHT = Theme(
    "#2a313c",
    "#e3e6ea",
    "#ffffff",
    ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#57534e"),
)
DARK = Theme(
    "#d7dce3",
    "#2b333f",
    "#151a21",
    ("#60a5fa", "#fbbf24", "#34d399", "#f472b6", "#a78bfa", "#22d3ee", "#a3e635", "#d6d3d1"),
)

Log = Sequence[LogEntry]
Line = tuple[Sequence[int], Sequence[float], Mapping[str, Any]]
"""Images, values, and matplotlib's options of the line."""


def save_curves(path: str | Path, runs: Mapping[str, Log]) -> None:
    """Writes the training curves of runs as one PNG of four charts over the images seen.

    The charts show the training loss, the held-out loss (dashed: of the EMA), the learning rate
    and the mask flips, in one colour per run; fewer than three values are no curve. The file is
    replaced atomically.

    Args:
        path: The PNG to write; its folder is made.
        runs: The name of every run -> its log, as ``read_log`` returns it.

    Raises:
        OSError: The file cannot be written.
    """
    with replace_atomically(Path(path)) as part:
        part.write_bytes(draw_curves(runs))


def draw_curves(
    runs: Mapping[str, Log], theme: Theme = LIGHT, *, charts: Sequence[Chart] | None = None
) -> bytes:
    """Returns a PNG of charts over the images seen, one colour per run (name -> log).

    The four of ``CHARTS`` are the training loss (its moving average, and the raw loss faint behind
    it), the held-out loss (dashed: of the EMA), the learning rate and the mask flips. A chart
    without a curve of ``POINTS`` values says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from PIL import Image

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    charts = CHARTS if charts is None else charts
    lines, columns = -(-len(charts) // 2), min(len(charts), 2)
    figure = Figure(figsize=(10, 3.2 * lines), dpi=DPI, layout=layout, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    colours = {name: theme.runs[i % len(theme.runs)] for i, name in enumerate(runs)}
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[len(charts) :]:
        axis.set_visible(False)
    for axis, chart in zip(axes, charts, strict=False):
        for name, log in runs.items():
            for images, values, style in find_curves(chart, log):
                axis.plot(images, values, color=colours[name], **style)
        style_axis(axis, chart, theme)
    add_legend(figure, colours, theme)
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png")
    # 256 colours are enough for lines, at two fifths of the size
    quantized = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    quantized.save(small, format="png", optimize=True)
    return small.getvalue()


def find_curves(chart: Chart, log: Log) -> list[Line]:
    """Returns the lines of a chart that have at least ``POINTS`` finite values."""
    lines = chart.lines(log)
    return [line for line in lines if sum(map(math.isfinite, line[1])) >= POINTS]


def has_curve(log: Log) -> bool:
    """Returns whether any chart of the log has a curve."""
    return any(find_curves(chart, log) for chart in CHARTS)


def find_charts(runs: Mapping[str, Log]) -> list[Chart]:
    """Returns the charts in which any of the runs has a curve."""
    return [chart for chart in CHARTS if any(find_curves(chart, log) for log in runs.values())]


def trace_training_loss(log: Log) -> list[Line]:
    """Returns the training loss; a long one faint, with its moving average over it."""
    images, values, style = trace_steps(log, lambda entry: entry.loss)
    window = len(values) // WINDOWS
    if window < 2:
        return [(images, values, style)]
    faint = {"alpha": 0.22, "linewidth": 0.7}
    return [(images, values, faint), (images, smooth(values, window), style)]


def trace_held_out_loss(log: Log) -> list[Line]:
    """Returns the held-out loss of the student, and dashed that of its EMA where there is one."""
    entries = [entry for entry in log if isinstance(entry, HeldOutEntry)]
    images = [entry.images for entry in entries]
    student, ema = [e.held_out for e in entries], [e.held_out_ema for e in entries]
    dashed = {"linestyle": "--", "markerfacecolor": "none"}
    return [make_line(images, student), make_line(images, ema, **dashed)]


def trace_learning_rate(log: Log) -> list[Line]:
    """Returns the learning rate."""
    return [trace_steps(log, lambda entry: entry.lr)]


def trace_mask_flips(log: Log) -> list[Line]:
    """Returns the share of the mask that changed between two entries."""
    return [trace_steps(log, lambda entry: entry.flip_rate)]


def trace_steps(log: Log, pick: Callable[[StepEntry], float | None]) -> Line:
    """Returns the value that ``pick`` reads from every training entry."""
    entries = [entry for entry in log if isinstance(entry, StepEntry)]
    return make_line([entry.images for entry in entries], [pick(entry) for entry in entries])


def make_line(images: Sequence[int], values: Sequence[float | None], **style: Any) -> Line:
    """Returns the points that have a value, with markers where they are few."""
    points = [(x, y) for x, y in zip(images, values, strict=True) if y is not None]
    markers = {"marker": "o", "markersize": 4} if len(points) <= WINDOWS else {}
    return [x for x, _ in points], [y for _, y in points], {"linewidth": 1.6, **markers, **style}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Returns the centred moving average over ``window`` entries, fewer at the ends.

    NaN and Inf are left out.

    >>> smooth([0.0, 3.0, 6.0, float("nan")], 3)
    [1.5, 3.0, 4.5, 6.0]
    """
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    sums = np.cumsum([0.0, *np.where(finite, array, 0.0)])
    counts = np.cumsum([0, *finite])
    index = np.arange(len(array))
    low = np.maximum(index - (window - 1) // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(array))
    count = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(count, 1)
    return [float(mean) if n else math.nan for mean, n in zip(means, count, strict=True)]


def style_axis(axis: Any, chart: Chart, theme: Theme) -> None:
    """Sets title, scale, grid and tick labels of one chart."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    axis.set_title(chart.title, color=theme.ink, loc="left", fontsize=11, fontweight="bold")
    axis.set_ylabel(chart.unit, color=theme.ink)
    axis.set_xlabel("images seen", color=theme.ink)
    values = [y for line in axis.lines for y in line.get_ydata() if math.isfinite(y)]
    if not values:
        axis.text(
            0.5, 0.5, "fewer than 3 values", ha="center", color=theme.ink, transform=axis.transAxes
        )
        axis.set_xticks([])
        axis.set_yticks([])
    if chart.log and values and min(values) > 0 and max(values) > SPAN * min(values):
        axis.set_yscale("log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if chart.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_facecolor(theme.paper)
    dress_axis(axis, theme)


def dress_axis(axis: Any, theme: Theme, *, labelsize: int = 9) -> None:
    """Gives an axis the grid, ticks and two edges of all charts."""
    axis.grid(color=theme.grid)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=theme.ink, length=0, labelsize=labelsize)
    for edge, spine in axis.spines.items():
        spine.set_visible(edge in ("left", "bottom"))
        spine.set_color(theme.ink)


def add_legend(figure: Any, colours: Mapping[str, str], theme: Theme) -> None:
    """Adds a legend above the charts where there is more than one run."""
    from matplotlib.lines import Line2D

    if len(colours) < 2:
        return
    figure.legend(
        [Line2D([], [], color=colour, linewidth=3) for colour in colours.values()],
        list(colours),
        loc="outside upper center",
        ncols=max(1, min(len(colours), 4, LEGEND // (8 + max(map(len, colours))))),
        frameon=False,
        labelcolor=theme.ink,
    )


@dataclass(frozen=True, slots=True)
class Chart:
    """One of the charts; ``log`` allows a logarithmic scale, see ``SPAN``."""

    title: str
    unit: str
    lines: Callable[[Log], Iterable[Line]]
    log: bool = False
    percent: bool = False


CHARTS = (
    Chart("training loss", "mean squared error", trace_training_loss, log=True),
    Chart("held-out loss (dashed: EMA)", "mean squared error", trace_held_out_loss, log=True),
    Chart("learning rate", "step size", trace_learning_rate),
    Chart("mask flips", "share of the mask", trace_mask_flips, percent=True),
)
