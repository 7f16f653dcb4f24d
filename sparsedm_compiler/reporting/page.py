"""Compares training runs on one self-contained HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from ..errors import DataError
from ..optional_deps import DISTRIBUTIONS, is_installed
from .charts import DARK, LIGHT, draw_curves, find_charts, has_curve
from .grouping import SeedGroup, find_differences, group_runs, name_runs, sort_by_pattern
from .html import (
    Cell,
    Link,
    Section,
    make_document,
    make_picture,
    make_table,
    make_zoomable_figure,
)
from .results_table import make_results
from .run_record import RunRecord, read_run

FEW = len(LIGHT.runs)
"""Runs in one chart at most, as many as there are colours."""
CHART_PACKAGES = ("matplotlib", "PIL")
"""Packages that draw the curves, without which a page has none."""


def report_page(runs: Sequence[str | Path], out: str | Path) -> None:
    """Writes one HTML file that compares training runs.

    The page holds everything it shows and needs no network: a table that can be sorted and
    filtered (losses, scores, MACs, speed; the best of every pattern is marked), the curves of more
    than two values, the last sample grids beside real images, and a row of options for every run.
    Runs that differ in their seed alone share a row of means and standard deviations. A run that is
    still going is shown as far as it is. Without JavaScript only sorting and filtering are missing.

    Args:
        runs: The folders of the runs, as ``finetune`` and ``sparsedm finetune`` write them.
        out: The HTML file to write; its folder is made.

    Raises:
        DataError: A folder holds no run or is given twice, a file in it is damaged, or ``out``
            cannot be written.
    """
    text = render_page(name_runs([read_run(folder) for folder in runs]))
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error


def render_page(runs: Mapping[str, RunRecord]) -> str:
    """Returns the HTML that compares these runs, by name."""
    groups = sort_by_pattern(group_runs(runs))
    runs = {name: run for group in groups for name, run in group.runs.items()}
    shown = runs
    if len(runs) > FEW:
        shown = dict(next(iter(group.runs.items())) for group in groups)
    title = f"{len(runs)} training runs compared" if len(runs) > 1 else f"Run {min(runs)}"
    anchors = make_anchors(runs, shown)
    return make_document(
        title,
        summarize(runs, groups),
        [
            Section("Results", "results", make_results(groups, anchors)),
            Section("Curves", "curves", make_curves(shown)),
            Section("Samples", "samples", make_samples(shown, anchors)),
            Section("What differs", "differences", make_differences(runs, anchors)),
            Section("Configurations and machines", "configurations", make_configs(runs, anchors)),
        ],
    )


def make_anchors(
    runs: Mapping[str, RunRecord], shown: Mapping[str, RunRecord]
) -> dict[str, list[Link]]:
    """Returns the links of every run: to its configuration, and to its sample grid if it is shown.

    They are numbered from 1 on; 0 is the grid of real images.
    """
    anchors = {}
    for number, (name, run) in enumerate(runs.items(), 1):
        anchors[name] = [Link(name, f"run-{number}")]
        if name in shown and run.samples is not None:
            anchors[name].append(Link("samples", f"samples-{number}"))
    return anchors


def summarize(runs: Mapping[str, RunRecord], groups: Sequence[SeedGroup]) -> list[str]:
    """Returns the lines under the title: which runs are compared, and how rows are averaged."""
    labels = dict.fromkeys(group.first.label for group in groups)
    text = ", ".join(labels)
    if len(labels) > FEW:
        methods = dict.fromkeys(run.method for run in runs.values())
        patterns = dict.fromkeys(run.pattern for run in runs.values() if run.pattern)
        text = f"{', '.join(methods)}; patterns {', '.join(patterns)}"
    seeds = sorted({run.seed for run in runs.values()})
    plural = "seeds" if len(seeds) > 1 else "seed"
    lines = [f"{text}; {plural} {', '.join(map(str, seeds))}."]
    if any(len(group.runs) > 1 for group in groups):
        lines.append(
            "Runs that differ in nothing but their seed share a row: "
            "mean ± standard deviation over n runs."
            + (" Curves and samples are those of the first." if len(runs) > FEW else "")
        )
    if waiting := [name for name, run in runs.items() if not run.finished]:
        lines.append(f"Not finished: {', '.join(waiting)}. Their values are the last they wrote.")
    return lines


def make_curves(runs: Mapping[str, RunRecord]) -> str:
    """Returns the charts of the runs, light and dark; of many runs, charts by pattern."""
    if missing := [package for package in CHART_PACKAGES if not is_installed(package)]:
        needs = " and ".join(DISTRIBUTIONS.get(package, package) for package in missing)
        return (
            f'<p class="soft">Left out: charts need {needs}, not installed here: '
            "pip install &quot;sparsedm-compiler[train]&quot;</p>"
        )
    drawn = {name: run for name, run in runs.items() if has_curve(run.log)}
    flat = [name for name in runs if name not in drawn]
    note = f"Fewer than three values, and so no curve: {', '.join(flat)}." if flat else ""
    note = note if drawn else "No curves: no log of these runs has three values to draw."
    below = f'<p class="soft">{escape(note)}</p>' if note else ""
    return "".join(make_chart_figure(drawn, names) for names in split_runs(drawn)) + below


def split_runs(runs: Mapping[str, RunRecord]) -> list[list[str]]:
    """Returns the names of the runs that share a picture; those of many runs share a pattern."""
    if len(runs) <= FEW:
        return [[*runs]] if runs else []
    patterns = dict.fromkeys(run.pattern for run in runs.values())
    alike = [[name for name in runs if runs[name].pattern == pattern] for pattern in patterns]
    return [names[k : k + FEW] for names in alike for k in range(0, len(names), FEW)]


def make_chart_figure(runs: Mapping[str, RunRecord], names: Sequence[str]) -> str:
    """Returns the charts of the runs of these names, light and dark."""
    logs = {name: runs[name].log for name in names}
    charts = find_charts(logs)
    light, dark = draw_curves(logs, charts=charts), draw_curves(logs, DARK, charts=charts)
    titles = ", ".join(chart.title for chart in charts)
    chart = make_picture(light, dark, f"curves over the images seen: {titles}")
    patterns = ", ".join(dict.fromkeys(runs[name].pattern or "dense" for name in names))
    text = patterns if len(names) < len(runs) else ""
    caption = f"<figcaption>{escape(text)}</figcaption>" if text else ""
    return f'<figure class="scroll card chart">{caption}{chart}</figure>'


def make_samples(runs: Mapping[str, RunRecord], anchors: Mapping[str, Sequence[Link]]) -> str:
    """Returns the real images and the last sample grids, side by side. Raises DataError."""
    with_grid = {name: run for name, run in runs.items() if run.samples is not None}
    real: dict[bytes, list[str]] = {}
    for name, run in with_grid.items():
        if run.real_images is not None:
            real.setdefault(read_image(run.real_images), []).append(name)
    figures = []
    for index, (image, names) in enumerate(real.items()):
        of_runs = f" of {', '.join(names)}" if len(real) > 1 else ""
        caption = escape(f"real images{of_runs}, as a yardstick")
        figures.append(make_zoomable_figure(image, caption, -index, kind="real"))
    for name, run in with_grid.items():
        link, samples = anchors[name]
        number = int(samples.anchor.partition("-")[2])
        caption = f"{link.render()}: {escape(f'{run.label}, after {run.images:,} images')}"
        assert run.samples is not None
        figures.append(make_zoomable_figure(read_image(run.samples), caption, number))
    return f'<div class="grids">{"".join(figures)}</div>' if figures else ""


def read_image(path: Path) -> bytes:
    """Returns the bytes of a PNG. Raises DataError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def make_differences(runs: Mapping[str, RunRecord], anchors: Mapping[str, Sequence[Link]]) -> str:
    """Returns the table of options that are not equal in all runs: a row for every run."""
    options = find_differences(runs)
    heads = [Cell("run", left=True), *(Cell(option) for option in options)]
    rows = [
        [
            Cell(name, left=True, link=anchors[name][0]),
            *(Cell(values[name], value=read_number(values[name])) for values in options.values()),
        ]
        for name in runs
    ]
    return make_table(heads, rows) if options else ""


def read_number(text: str) -> float | None:
    """Returns the finite number that ``text`` is, None for other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def make_configs(runs: Mapping[str, RunRecord], anchors: Mapping[str, Sequence[Link]]) -> str:
    """Returns all options and the machine of every run, collapsed."""
    parts = []
    for name, run in runs.items():
        text = json.dumps({"config": run.config, "machine": run.machine}, indent=2)
        link, *samples = anchors[name]
        more = "".join(f"<p>{sample.render()}</p>" for sample in samples)
        parts.append(
            f'<details id="{link.anchor}"><summary>{escape(name)}</summary>{more}'
            f"<pre>{escape(text)}</pre></details>"
        )
    return f'<div class="card">{"".join(parts)}</div>'
