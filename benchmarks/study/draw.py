"""Line charts of a study: panels side by side in one PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsedm_compiler.reporting.charts import DPI, LIGHT, dress_axis

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: a line per name, through its points in their order.

    ``ticks``: labels of x = 0, 1, ...; None has a logarithmic x where ``log_x``. ``level``: a
    dashed line at that height, called ``level_name``.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Points]
    ticks: Sequence[str] | None = None
    log_x: bool = False
    log_y: bool = False
    level: float | None = None
    level_name: str = "dense"


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Writes the panels side by side as a PNG of few colours, one colour per name of a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    size = (5.2 * max(2, len(panels)) - (2.4 if len(panels) > 2 else 0), 3.9)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=LIGHT.paper)
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: LIGHT.runs[i % len(LIGHT.runs)] for i, name in enumerate(names)}
    for axis, panel in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True
    ):
        draw_panel(axis, panel, colours)
    handles: dict[str, object] = {}
    for axis in figure.axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=5,
        frameon=False,
        labelcolor=LIGHT.ink,
    )
    full = io.BytesIO()
    figure.savefig(full, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(full).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(path, format="png", optimize=True)


def draw_panel(axis: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    """Draws one panel."""
    for name, points in panel.lines.items():
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(
                x, y, color=colours[name], label=name, marker="o", markersize=4, linewidth=1.6
            )
    if panel.level is not None:
        style = {"color": LIGHT.ink, "linestyle": "--", "linewidth": 1}
        axis.axhline(panel.level, label=panel.level_name, **style)
    axis.set_title(panel.title, color=LIGHT.ink, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel(panel.x, color=LIGHT.ink)
    axis.set_ylabel(panel.y, color=LIGHT.ink)
    axis.set_xscale("log" if panel.log_x else "linear")
    axis.set_yscale("log" if panel.log_y else "linear")
    for line, log in ((axis.xaxis, panel.log_x), (axis.yaxis, panel.log_y)):
        if log:
            line.set_major_formatter("{x:g}")
            line.set_minor_formatter("{x:g}")
    if panel.ticks is not None:
        axis.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=45)
    dress_axis(axis, LIGHT)
