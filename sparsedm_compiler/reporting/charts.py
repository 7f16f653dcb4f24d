"""``save_curves``: losses, learning rate and mask flips of training runs in one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..fileio import replace_atomically
from .run_log_format import Entry, Held, Trained, read_log

__all__ = ["DARK", "LIGHT", "Entry", "Held", "Trained", "draw_curves", "read_log", "save_curves"]

WINDOWS = 30
"""A training loss is averaged over a thirtieth of its points."""
DPI = 130
LEGEND = 128
"""Letters that fit beside each other in a legend; the line before a name takes the room of 8."""
SPAN = 20
"""A loss whose largest value is this many times its smallest is drawn on a logarithmic scale."""


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a picture: text and frame, grid, background, and one per run."""

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

Log = Sequence[Entry]
Line = tuple[Sequence[int], Sequence[float], Mapping[str, Any]]
"""Images, values, and how matplotlib draws them."""


def save_curves(path: str | Path, runs: Mapping[str, Log]) -> None:
    """Write the PNG of ``draw_curves`` at ``path``, whole or not at all, making its folder."""
    with replace_atomically(Path(path)) as part:
        part.write_bytes(draw_curves(runs))


def draw_curves(runs: Mapping[str, Log], theme: Theme = LIGHT) -> bytes:
    """A PNG of four charts over the images seen, one colour per run (its name -> its log).

    Training loss (its moving average, and faint behind it the raw one), held-out loss (dashed: of
    the average), learning rate, mask flips. A chart that has no values says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from PIL import Image

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(10, 6.4), dpi=DPI, layout=layout, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    colours = {name: theme.runs[i % len(theme.runs)] for i, name in enumerate(runs)}
    for axis, chart in zip(figure.subplots(2, 2).flat, CHARTS, strict=True):
        for name, log in runs.items():
            for images, values, how in chart.lines(log):
                axis.plot(images, values, color=colours[name], **how)
        dress(axis, chart, theme)
    name_runs(figure, colours, theme)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # 256 colours are enough for lines, at two fifths of the size
    few = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(small, format="png", optimize=True)
    return small.getvalue()


def training_loss(log: Log) -> list[Line]:
    """The raw loss, faint where it is long enough to be averaged, and its moving average."""
    images, values, how = trained(log, lambda entry: entry.loss)
    window = len(values) // WINDOWS
    if window < 2:
        return [(images, values, how)]
    faint = {"alpha": 0.22, "linewidth": 0.7}
    return [(images, values, faint), (images, smoothed(values, window), how)]


def held_out_loss(log: Log) -> list[Line]:
    """The held-out loss of the student, and of its average where there is one."""
    held = [entry for entry in log if isinstance(entry, Held)]
    student, average = ([entry.held_out for entry in held], [e.held_out_ema for e in held])
    images = [entry.images for entry in held]
    return [line(images, student), line(images, average, linestyle="--", markerfacecolor="none")]


def trained(log: Log, pick: Callable[[Trained], float | None]) -> Line:
    """What ``pick`` finds in the training entries."""
    entries = [entry for entry in log if isinstance(entry, Trained)]
    return line([entry.images for entry in entries], [pick(entry) for entry in entries])


def learning_rate(log: Log) -> list[Line]:
    """The learning rate."""
    return [trained(log, lambda entry: entry.lr)]


def mask_flips(log: Log) -> list[Line]:
    """The share of the mask that changed between two entries."""
    return [trained(log, lambda entry: entry.flip_rate)]


def line(images: Sequence[int], values: Sequence[float | None], **how: Any) -> Line:
    """The points that have a value, marked where they are few."""
    points = [(x, y) for x, y in zip(images, values, strict=True) if y is not None]
    few = {"marker": "o", "markersize": 4} if len(points) <= WINDOWS else {}
    return [x for x, _ in points], [y for _, y in points], {"linewidth": 1.6, **few, **how}


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean over ``window`` entries around each, fewer at the ends; NaN and Inf left out.

    >>> smoothed([0.0, 3.0, 6.0, float("nan")], 3)
    [1.5, 3.0, 4.5, 6.0]
    """
    found = np.asarray(values, dtype=np.float64)
    good = np.isfinite(found)
    sums = np.cumsum([0.0, *np.where(good, found, 0.0)])
    counts = np.cumsum([0, *good])
    at = np.arange(len(found))
    low = np.maximum(at - (window - 1) // 2, 0)
    high = np.minimum(at + window // 2 + 1, len(found))
    count = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(count, 1)
    return [float(mean) if n else math.nan for mean, n in zip(means, count, strict=True)]


def dress(axis: Any, chart: Chart, theme: Theme) -> None:
    """Title, scale, grid and numbers of one chart."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    axis.set_title(chart.title, color=theme.ink, loc="left", fontsize=11, fontweight="bold")
    axis.set_ylabel(chart.unit, color=theme.ink)
    axis.set_xlabel("images seen", color=theme.ink)
    values = [y for drawn in axis.lines for y in drawn.get_ydata() if math.isfinite(y)]
    if not values:
        axis.text(0.5, 0.5, "no values yet", ha="center", color=theme.ink, transform=axis.transAxes)
        axis.set_xticks([])
        axis.set_yticks([])
    if chart.log and values and min(values) > 0 and max(values) > SPAN * min(values):
        axis.set_yscale("log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if chart.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_facecolor(theme.paper)
    axis.grid(color=theme.grid)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=theme.ink, length=0, labelsize=9)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)


def name_runs(figure: Any, colours: Mapping[str, str], theme: Theme) -> None:
    """A legend over the charts, where there is more than one run to tell apart."""
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
    """One of the charts; ``log``: a logarithmic scale where its values span much."""

    title: str
    unit: str
    lines: Callable[[Log], Iterable[Line]]
    log: bool = False
    percent: bool = False


CHARTS = (
    Chart("training loss", "mean squared error", training_loss, log=True),
    Chart("held-out loss (dashed: average)", "mean squared error", held_out_loss, log=True),
    Chart("learning rate", "step size", learning_rate),
    Chart("mask flips", "share of the mask", mask_flips, percent=True),
)
