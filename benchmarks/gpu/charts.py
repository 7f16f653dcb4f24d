"""Two pictures: layers over the number of tokens, and whole models as bars."""

from __future__ import annotations

from math import exp, log
from pathlib import Path
from typing import Any

from sparsedm_compiler.reporting.charts import LIGHT, dress_axis

from .plan import FULL
from .quality import Quality, read_quality
from .results import Results
from .summary import REHEARSAL, patterns_of

COLUMNS = 3
DPI = 130
Points = dict[int, list[float]]
"""Tokens -> the ratios of the layers."""


def draw(results: Results, out: Path) -> None:
    """Write ops.png and models.png, of what there is."""
    known = read_quality(results)
    if any(points_of(results, text) for text in patterns_of(results["ops"])):
        save(ops(results, known), out / "ops.png")
    if results["models"] or results["table"]:
        save(bars(results, known), out / "models.png")


def ops(results: Results, known: Quality) -> Any:
    """A panel per model, a line per pattern: the mean over its layers, and from which to which."""
    widths = widths_of(results)
    models = sorted(widths, key=lambda model: widths[model])
    patterns = patterns_of(results["ops"])
    rows = -(-len(models) // COLUMNS)
    across = min(COLUMNS, len(models))
    figure = blank((4.2 * across + 0.6, 3.2 * rows + 1.2))
    axes = figure.subplots(rows, across, squeeze=False, sharey=True).flat
    for axis, model in zip(axes, models, strict=False):
        for text in patterns:
            curve(axis, points_of(results, text, model), colour(text))
        dress(axis, f"{model}, width {widths[model]}")
        axis.axhline(1, color=LIGHT.ink, linewidth=1.0)
        axis.set_xscale("log", base=2)
        axis.minorticks_off()
        tokens = sorted({row["tokens"] for row in results["ops"]})
        axis.set_xticks(tokens, [short(count) for count in tokens])
        axis.set_xlabel("tokens", color=LIGHT.ink)
    for axis in figure.axes[len(models) :]:
        axis.set_visible(False)
    for axis in figure.axes[::across]:
        axis.set_ylabel("times faster than cuBLASLt", color=LIGHT.ink)
    legend(figure, patterns, known)
    title(
        figure, results, "Single linear layers, bf16: mean over a model's layers, and their range"
    )
    return figure


def widths_of(results: Results) -> dict[str, int]:
    """The width of every model: its narrowest side."""
    widths: dict[str, int] = {}
    for row in results["ops"]:
        width = min(row["cols"], row["rows"])
        widths[row["model"]] = min(width, widths.get(row["model"], width))
    return widths


def points_of(results: Results, pattern: str, model: str | None = None) -> Points:
    """The ratios of a pattern, by tokens."""
    points: Points = {}
    for row in results["ops"]:
        cell = row["patterns"].get(pattern, {})
        if "ratio" in cell and model in (None, row["model"]):
            points.setdefault(row["tokens"], []).append(cell["ratio"][1])
    return dict(sorted(points.items()))


def curve(axis: Any, points: Points, ink: str) -> None:
    """One pattern in one panel."""
    if not points:
        return
    tokens = list(points)
    means = [exp(sum(map(log, values)) / len(values)) for values in points.values()]
    axis.plot(tokens, means, color=ink, marker="o", markersize=4, linewidth=1.8)
    low, high = ([f(values) for values in points.values()] for f in (min, max))
    axis.fill_between(tokens, low, high, color=ink, alpha=0.12, linewidth=0)


def bars(results: Results, known: Quality) -> Any:
    """A group of bars per model and batch, and the paper's block; the line is the dense model."""
    groups = groups_of(results)
    patterns = list(dict.fromkeys(text for _, ratios in groups for text in ratios))
    figure = blank((10.5, 0.62 * len(groups) + 2.2))
    axis = figure.subplots()
    height = 0.8 / max(1, len(patterns))
    longest = max((high for _, ratios in groups for _, _, high in ratios.values()), default=1.0)
    for at, (_, ratios) in enumerate(groups):
        for index, (text, (low, middle, high)) in enumerate(ratios.items()):
            y = at + (index - (len(ratios) - 1) / 2) * height
            spread = [[middle - low], [high - middle]]
            axis.barh(
                y, middle, height * 0.9, color=colour(text), xerr=spread,
                error_kw={"ecolor": LIGHT.ink, "elinewidth": 0.8},
            )  # fmt: skip
            at_end = {"va": "center", "fontsize": 8, "color": LIGHT.ink}
            axis.text(high + 0.01 * longest, y, f"{middle:.2f}", **at_end)
    dress(axis, "")
    axis.set_ylim(-0.5, len(groups) - 0.5)
    axis.axvline(1, color=LIGHT.ink, linewidth=1.2)
    axis.set_yticks(range(len(groups)), [name for name, _ in groups])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.08 * longest)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("times faster than compiled dense (CUDA graphs)", color=LIGHT.ink)
    legend(figure, patterns, known)
    title(figure, results, "Whole models, bf16, every layer gated: medians and quartiles")
    return figure


def groups_of(results: Results) -> list[tuple[str, dict[str, list[float]]]]:
    """(name, {pattern: quartiles}) of every model, and of the best cell of the table."""
    groups = []
    for row in results["models"]:
        ratios = {text: cell["ratio"] for text, cell in row["patterns"].items() if "ratio" in cell}
        if ratios:
            groups.append((f"{row['model']}\nbatch {row['batch']}", ratios))
    if results["table"]:
        best = max(results["table"], key=lambda row: row["over_compiled"][1])
        name = f"U-ViT block of width {best['width']}\nmlp_ratio {best['mlp_ratio']}, patch "
        groups.append(
            (
                f"{name}{best['patch']}, batch {best['batch']}",
                {best["pattern"]: best["over_compiled"]},
            )
        )
    return groups


def blank(size: tuple[float, float]) -> Any:
    """An empty figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=size, dpi=DPI, layout=layout, facecolor=LIGHT.paper)
    FigureCanvasAgg(figure)
    return figure


def dress(axis: Any, name: str) -> None:
    """Title, grid, and the line of dense."""
    axis.set_title(name, color=LIGHT.ink, loc="left", fontsize=10, fontweight="bold")
    dress_axis(axis, LIGHT, labelsize=8)


def legend(figure: Any, patterns: list[str], known: Quality) -> None:
    """Every pattern with its quality: no speed without it."""
    from matplotlib.patches import Patch

    figure.legend(
        [Patch(color=colour(text)) for text in patterns],
        [f"{text}: {known.of(text)}" for text in patterns],
        loc="outside lower center",
        ncols=min(3, len(patterns)),
        frameon=False,
        fontsize=8,
        labelcolor=LIGHT.ink,
    )


def title(figure: Any, results: Results, text: str) -> None:
    """What is shown, on which card."""
    card = REHEARSAL if results["rehearsal"] else results["environment"]["gpu"]
    figure.suptitle(f"{text}\n{card}", color=LIGHT.ink, fontsize=11, x=0.01, ha="left")


def save(figure: Any, path: Path) -> None:
    """As PNG."""
    figure.savefig(path, format="png")


def colour(pattern: str) -> str:
    """The same in both pictures."""
    known = FULL.op_patterns
    index = known.index(pattern) if pattern in known else len(known)
    return LIGHT.runs[index]


def short(tokens: int) -> str:
    """16384 as 16k."""
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)
