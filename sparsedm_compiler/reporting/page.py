"""Compares training runs on one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import mean, stdev

from ..errors import DataError
from ..evaluate.score import ScoreKey
from ..optional_deps import DISTRIBUTIONS, is_installed
from .charts import DARK, LIGHT, draw_curves
from .grouping import (
    ABSENT,
    SeedGroup,
    find_differences,
    group_runs,
    name_runs,
    sort_by_pattern,
)
from .html import Cell, encode_png, make_document, make_picture, make_section, make_table
from .run_record import RunRecord, read_run

FEW = len(LIGHT.runs)
"""Runs in one chart at most, as many as there are colours."""
CHART_PACKAGES = ("matplotlib", "PIL")
"""Packages that draw the curves, without which a page has none."""
BETTER = {
    **dict.fromkeys(("FD", "FID", "KID"), "lower is better"),
    **dict.fromkeys(("IS", "precision", "recall", "density", "coverage"), "higher is better"),
}


def report_page(runs: Sequence[str | Path], out: str | Path) -> None:
    """Writes one HTML file that compares training runs.

    The page holds everything it shows: a table (losses, scores, MACs, speed), the curves, the last
    sample grids, and the options that differ. Runs that differ in their seed alone share a row of
    means and standard deviations. A run that is still going is shown as far as it is.

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
    return make_document(
        title,
        summarize(runs, groups),
        [
            make_section("Results", make_results(groups)),
            make_section("Curves", make_curves(shown)),
            make_section("Samples", make_samples(shown)),
            make_section("What differs between the runs", make_differences(shown)),
            make_section("Configurations and machines", make_configs(runs)),
        ],
    )


def summarize(runs: Mapping[str, RunRecord], groups: Sequence[SeedGroup]) -> list[str]:
    """Returns the lines under the title: which runs are compared, and how rows are averaged."""
    labels = dict.fromkeys(group.first.label for group in groups)
    seeds = sorted({run.seed for run in runs.values()})
    plural = "seeds" if len(seeds) > 1 else "seed"
    lines = [f"{', '.join(labels)}; {plural} {', '.join(map(str, seeds))}."]
    if any(len(group.runs) > 1 for group in groups):
        lines.append(
            "Runs that differ in nothing but their seed share a row: "
            "mean ± standard deviation over n runs."
            + (" Curves and samples are those of the first." if len(runs) > FEW else "")
        )
    if waiting := [name for name, run in runs.items() if not run.finished]:
        lines.append(f"Not finished: {', '.join(waiting)}. Their values are the last they wrote.")
    return lines


def make_results(groups: Sequence[SeedGroup]) -> str:
    """Returns the table of results, one row per group, with notes on its columns."""
    runs = [run for group in groups for run in group.runs.values()]
    keys = [*dict.fromkeys(score.key for run in runs for score in run.scores)]
    heads = [
        Cell("method", left=True),
        Cell("pattern", left=True),
        Cell("seed"),
        Cell("images"),
        Cell("held-out loss"),
        Cell("of the EMA"),
        *(Cell(f"{name_score(key)} [{number}]") for number, key in enumerate(keys, 1)),
        Cell("MACs"),
        Cell("speed"),
        Cell("images/s"),
    ]
    notes = [
        *(f"[{number}] {describe_score(key)}" for number, key in enumerate(keys, 1)),
        "Held-out loss: the denoising error on data never trained on, of the student and of the "
        "exponential moving average (EMA) of its weights; lower is better.",
        "MACs: conv and linear layers of one forward, dense → pruned. Images/s: while training.",
        *describe_baselines(groups),
    ]
    rows = [make_row(group, keys) for group in groups]
    return make_table(heads, rows, kind="sort stack", notes=notes)


def name_score(key: ScoreKey) -> str:
    """Returns the metric with its feature network, e.g. "FD-InceptionV3"."""
    return f"{key.metric}-{key.network}" if key.network else key.metric


def describe_score(key: ScoreKey) -> str:
    """Returns the note on a score: counts, sampler, and which direction is better."""
    hint = f"; {BETTER[key.metric]}" if key.metric in BETTER else ""
    count = key.reference_count
    images = "an unknown number of" if count is None else f"{count:,}"
    about = f"{key.count:,} samples against {images} images, {key.sampler}{hint}."
    return f"{name_score(key)}: {about}"


def make_row(group: SeedGroup, keys: Iterable[ScoreKey]) -> list[Cell]:
    """Returns the cells of a group, in the order of the heads."""
    run, runs = group.first, [*group.runs.values()]
    seeds = sorted(member.seed for member in runs)
    losses = [member.held_out for member in runs if member.held_out is not None]
    total = "" if run.finished or run.goal is None else f"of {run.goal:,}"
    return [
        Cell(
            run.method,
            title=", ".join(group.runs),
            left=True,
            badge="" if run.finished else "unfinished",
        ),
        Cell(run.pattern or "dense", left=True),
        Cell(", ".join(map(str, seeds)), value=seeds[0]),
        Cell(f"{run.images:,}", total, run.images),
        make_spread_cell(entry.held_out for entry in losses),
        make_spread_cell(entry.held_out_ema for entry in losses),
        *(make_spread_cell(member.find_score(key) for member in runs) for key in keys),
        make_macs_cell(run),
        make_speed_cell(group),
        make_spread_cell((member.images_per_second for member in runs), digits=3),
    ]


def make_spread_cell(values: Iterable[float | None], *, digits: int = 4) -> Cell:
    """Returns the value, or mean and standard deviation of several; None is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell(ABSENT)
    if len(known) == 1:
        return Cell(format_number(known[0], digits), value=known[0], title=repr(known[0]))
    middle = mean(known)
    text = f"{format_number(middle, digits)} ± {format_number(stdev(known), 2)}"
    return Cell(text, f"n = {len(known)}", middle, ", ".join(map(repr, known)))


def format_number(value: float, digits: int) -> str:
    """Returns ``value`` with that many significant digits; large numbers keep all before the point.

    >>> format_number(0.078612, 4), format_number(12345.6, 3)
    ('0.07861', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def make_macs_cell(run: RunRecord) -> Cell:
    """Returns the MACs before and after pruning; all digits on hover."""
    if run.macs is None:
        return Cell(ABSENT)
    dense, sparse, attention = run.macs.dense, run.macs.sparse, run.macs.attention
    return Cell(
        format_macs(dense, sparse),
        f"÷ {dense / max(sparse, 1):.2f}",
        sparse,
        f"{dense:,} → {sparse:,}; attention apart: {attention:,}",
    )


def format_macs(dense: int, sparse: int) -> str:
    """Returns both numbers with three digits, in the unit that suits the first.

    >>> format_macs(11_321_564_160, 970_000_000), format_macs(999, 10)
    ('11.3 → 0.97 G', '999 → 10')
    """
    units = ((12, " T"), (9, " G"), (6, " M"), (3, " k"))
    power, unit = next((entry for entry in units if dense >= 10 ** entry[0]), (0, ""))
    return f"{dense / 10**power:.3g} → {sparse / 10**power:.3g}{unit}"


def make_speed_cell(group: SeedGroup) -> Cell:
    """Returns the speed-up over the dense baseline, or "not measured"."""
    speedups = [run.speedup for run in group.runs.values() if run.speedup is not None]
    cell = make_spread_cell((speedup.ratio for speedup in speedups), digits=3)
    return Cell("not measured") if cell.value is None else replace(cell, text=f"{cell.text}x")


def describe_baselines(groups: Sequence[SeedGroup]) -> list[str]:
    """Returns the notes on the baselines that speeds were measured against, if any."""
    baselines: dict[str, dict[str, None]] = {}
    for group in groups:
        for run in group.runs.values():
            if run.speedup is not None:
                baselines.setdefault(run.speedup.baseline, {})[run.label] = None
    if len(baselines) == 1:
        return [f"Speed: times faster than {next(iter(baselines))}, side by side in one process."]
    return [
        f"Speed of {', '.join(labels)}: times faster than {baseline}."
        for baseline, labels in baselines.items()
    ]


def make_curves(runs: Mapping[str, RunRecord]) -> str:
    """Returns the charts of the runs, light and dark; of many runs, charts by pattern."""
    if missing := [package for package in CHART_PACKAGES if not is_installed(package)]:
        needs = " and ".join(DISTRIBUTIONS.get(package, package) for package in missing)
        return (
            f'<p class="soft">Left out: charts need {needs}, not installed here: '
            "pip install &quot;sparsedm-compiler[train]&quot;</p>"
        )
    parts: list[list[str]] = [[*runs]]
    if len(runs) > FEW:
        patterns = dict.fromkeys(run.pattern for run in runs.values())
        alike = [[name for name in runs if runs[name].pattern == pattern] for pattern in patterns]
        parts = [names[k : k + FEW] for names in alike for k in range(0, len(names), FEW)]
    figures = []
    for names in parts:
        logs = {name: runs[name].log for name in names}
        light, dark = draw_curves(logs), draw_curves(logs, DARK)
        chart = make_picture(light, dark, "curves over the images seen")
        patterns_shown = ", ".join(dict.fromkeys(runs[name].pattern or "dense" for name in names))
        caption = f"<figcaption>{escape(patterns_shown)}</figcaption>" if len(parts) > 1 else ""
        figures.append(f'<figure class="scroll card chart">{caption}{chart}</figure>')
    return "".join(figures)


def make_samples(runs: Mapping[str, RunRecord]) -> str:
    """Returns the last sample grids of the runs, side by side. Raises DataError."""
    figures = []
    for name, run in runs.items():
        if run.samples is None:
            continue
        try:
            image = encode_png(run.samples.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {run.samples}: {error.strerror}") from error
        caption = f"{name}: {run.label}, after {run.images:,} images"
        figures.append(
            f'<figure class="card"><img src="{image}" alt="samples of {escape(name)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="grids">{"".join(figures)}</div>' if figures else ""


def make_differences(runs: Mapping[str, RunRecord]) -> str:
    """Returns the table of options that are not equal in all runs."""
    heads = [Cell("option", left=True), *(Cell(name) for name in runs)]
    rows = [
        [Cell(option, left=True), *(Cell(values[name]) for name in runs)]
        for option, values in find_differences(runs).items()
    ]
    return make_table(heads, rows, kind="stack") if rows else ""


def make_configs(runs: Mapping[str, RunRecord]) -> str:
    """Returns all options and the machine of every run, collapsed."""
    parts = []
    for name, run in runs.items():
        text = json.dumps({"config": run.config, "machine": run.machine}, indent=2)
        parts.append(
            f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        )
    return f'<div class="card">{"".join(parts)}</div>'
