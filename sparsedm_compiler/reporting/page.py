"""``report_page``: training runs compared on one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import mean, stdev

from ..errors import DataError
from .charts import DARK, LIGHT, draw_curves
from .grouping import ABSENT, Group, by_pattern, differing, grouped, named
from .html import Cell, document, picture, png, section, table
from .run_record import RunRecord, ScoreKind, read_run

FEW = len(LIGHT.runs)
"""More runs than there are colours are not drawn in one chart."""
BETTER = {
    **dict.fromkeys(("FD", "FID", "KID"), "lower is better"),
    **dict.fromkeys(("IS", "precision", "recall", "density", "coverage"), "higher is better"),
}


def report_page(runs: Sequence[str | Path], out: str | Path) -> None:
    """Write one HTML file at ``out`` that compares the runs in these folders.

    Runs that differ in nothing but their seed share a row: mean and standard deviation.
    Raises DataError for a folder that holds no run, and where ``out`` cannot be written.
    """
    text = page(named([read_run(folder) for folder in runs]))
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error


def page(runs: Mapping[str, RunRecord]) -> str:
    """The HTML that compares these runs, by name."""
    groups = by_pattern(grouped(runs))
    runs = {name: run for group in groups for name, run in group.runs.items()}
    shown = runs
    if len(runs) > FEW:
        shown = dict(next(iter(group.runs.items())) for group in groups)
    title = f"{len(runs)} training runs compared" if len(runs) > 1 else f"Run {min(runs)}"
    return document(
        title,
        summary(runs, groups),
        [
            section("Results", results(groups)),
            section("Curves", curves(shown)),
            section("Samples", samples(shown)),
            section("What differs between the runs", differences(shown)),
            section("Configurations and machines", configs(runs)),
        ],
    )


def summary(runs: Mapping[str, RunRecord], groups: Sequence[Group]) -> list[str]:
    """The lines under the title: what was compared, and how to read it."""
    kinds = dict.fromkeys(group.first.kind for group in groups)
    seeds = sorted({run.seed for run in runs.values()})
    plural = "seeds" if len(seeds) > 1 else "seed"
    lines = [f"{', '.join(kinds)}; {plural} {', '.join(map(str, seeds))}."]
    if any(len(group.runs) > 1 for group in groups):
        lines.append(
            "Runs that differ in nothing but their seed share a row: "
            "mean ± standard deviation over n runs."
            + (" Curves and samples are those of the first." if len(runs) > FEW else "")
        )
    if waiting := [name for name, run in runs.items() if not run.finished]:
        lines.append(f"Not finished: {', '.join(waiting)}. Their values are the last they wrote.")
    return lines


def results(groups: Sequence[Group]) -> str:
    """The table, one row per group, and below it what its columns depend on."""
    runs = [run for group in groups for run in group.runs.values()]
    kinds = [*dict.fromkeys(score.kind for run in runs for score in run.scores)]
    heads = [
        Cell("method", word=True),
        Cell("pattern", word=True),
        Cell("seed"),
        Cell("images"),
        Cell("held-out loss"),
        Cell("of the average"),
        *(Cell(f"{score_name(kind)} [{number}]") for number, kind in enumerate(kinds, 1)),
        Cell("MACs"),
        Cell("speed"),
        Cell("images/s"),
    ]
    notes = [
        *(f"[{number}] {score_note(kind)}" for number, kind in enumerate(kinds, 1)),
        "Held-out loss: the denoising error on data never trained on, of the student and of the "
        "moving average of its weights; lower is better.",
        "MACs: conv and linear layers of one forward, dense → pruned. Images/s: while training.",
        *speed_notes(groups),
    ]
    rows = [cells(group, kinds) for group in groups]
    return table(heads, rows, kind="sort stack", notes=notes)


def score_name(kind: ScoreKind) -> str:
    """The metric, and the network it looks through."""
    return f"{kind[0]}-{kind[1]}" if kind[1] else kind[0]


def score_note(kind: ScoreKind) -> str:
    """What a score depends on, and which way is better."""
    _, _, count, reference_count, sampler = kind
    hint = f"; {BETTER[kind[0]]}" if kind[0] in BETTER else ""
    images = "an unknown number of" if reference_count is None else f"{reference_count:,}"
    about = f"{count:,} samples against {images} images, {sampler}{hint}."
    return f"{score_name(kind)}: {about}"


def cells(group: Group, kinds: Iterable[ScoreKind]) -> list[Cell]:
    """The cells of a group, in the order of the heads."""
    run, seeds = group.first, sorted(each.seed for each in group.runs.values())
    held = [each.held for each in group.runs.values() if each.held is not None]
    left = "" if run.finished or run.goal is None else f"of {run.goal:,}"
    return [
        Cell(
            run.method,
            title=", ".join(group.runs),
            word=True,
            pill="" if run.finished else "unfinished",
        ),
        Cell(run.pattern or "dense", word=True),
        Cell(", ".join(map(str, seeds)), value=seeds[0]),
        Cell(f"{run.images:,}", left, run.images),
        spread(each.held_out for each in held),
        spread(each.held_out_ema for each in held),
        *(spread(each.score(kind) for each in group.runs.values()) for kind in kinds),
        macs(run),
        speed(group),
        spread((each.images_per_second for each in group.runs.values()), digits=3),
    ]


def spread(values: Iterable[float | None], *, digits: int = 4) -> Cell:
    """The value, or mean and standard deviation of several; None is left out."""
    found = [value for value in values if value is not None]
    if not found:
        return Cell(ABSENT)
    if len(found) == 1:
        return Cell(short(found[0], digits), value=found[0], title=repr(found[0]))
    middle = mean(found)
    text = f"{short(middle, digits)} ± {short(stdev(found), 2)}"
    return Cell(text, f"n = {len(found)}", middle, ", ".join(map(repr, found)))


def short(value: float, digits: int) -> str:
    """``value`` with that many significant digits, thousands kept whole.

    >>> short(0.078612, 4), short(12345.6, 3)
    ('0.07861', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def macs(run: RunRecord) -> Cell:
    """MACs before and after pruning; all digits on hover."""
    if run.macs is None:
        return Cell(ABSENT)
    dense, sparse, attention = run.macs.dense, run.macs.sparse, run.macs.attention
    return Cell(
        scaled(dense, sparse),
        f"÷ {dense / max(sparse, 1):.2f}",
        sparse,
        f"{dense:,} → {sparse:,}; attention apart: {attention:,}",
    )


def scaled(dense: int, sparse: int) -> str:
    """Both with three digits, in the unit of the first.

    >>> scaled(11_321_564_160, 970_000_000), scaled(999, 10)
    ('11.3 → 0.97 G', '999 → 10')
    """
    units = ((12, " T"), (9, " G"), (6, " M"), (3, " k"))
    power, unit = next((each for each in units if dense >= 10 ** each[0]), (0, ""))
    return f"{dense / 10**power:.3g} → {sparse / 10**power:.3g}{unit}"


def speed(group: Group) -> Cell:
    """Times faster than the baseline, or that it was not measured."""
    found = [run.speed for run in group.runs.values()]
    cell = spread((each.ratio for each in found if each is not None), digits=3)
    return Cell("not measured") if cell.value is None else replace(cell, text=f"{cell.text}x")


def speed_notes(groups: Sequence[Group]) -> list[str]:
    """What the speeds were measured against, where any were."""
    kinds: dict[str, dict[str, None]] = {}
    for group in groups:
        for run in group.runs.values():
            if run.speed is not None:
                kinds.setdefault(run.speed.baseline, {})[run.kind] = None
    if len(kinds) == 1:
        return [f"Speed: times faster than {next(iter(kinds))}, side by side in one process."]
    return [
        f"Speed of {', '.join(found)}: times faster than {baseline}."
        for baseline, found in kinds.items()
    ]


def curves(runs: Mapping[str, RunRecord]) -> str:
    """The charts of all runs, in light and in dark; many runs by pattern, a few to a picture."""
    parts: list[list[str]] = [[*runs]]
    if len(runs) > FEW:
        patterns = dict.fromkeys(run.pattern for run in runs.values())
        alike = [[name for name in runs if runs[name].pattern == pattern] for pattern in patterns]
        parts = [names[k : k + FEW] for names in alike for k in range(0, len(names), FEW)]
    figures = []
    for names in parts:
        logs = {name: runs[name].log for name in names}
        drawn = picture(draw_curves(logs), draw_curves(logs, DARK), "curves over the images seen")
        kinds = ", ".join(dict.fromkeys(runs[name].pattern or "dense" for name in names))
        caption = f"<figcaption>{escape(kinds)}</figcaption>" if len(parts) > 1 else ""
        figures.append(f'<figure class="scroll card chart">{caption}{drawn}</figure>')
    return "".join(figures)


def samples(runs: Mapping[str, RunRecord]) -> str:
    """The last sample grid of every run that drew one, side by side."""
    figures = []
    for name, run in runs.items():
        if run.samples is None:
            continue
        try:
            image = png(run.samples.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {run.samples}: {error.strerror}") from error
        caption = f"{name}: {run.kind}, after {run.images:,} images"
        figures.append(
            f'<figure class="card"><img src="{image}" alt="samples of {escape(name)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="grids">{"".join(figures)}</div>' if figures else ""


def differences(runs: Mapping[str, RunRecord]) -> str:
    """The options that are not the same in all runs."""
    found = differing(runs)
    heads = [Cell("option", word=True), *(Cell(name) for name in runs)]
    rows = [
        [Cell(option, word=True), *(Cell(values[name]) for name in runs)]
        for option, values in found.items()
    ]
    return table(heads, rows, kind="stack") if rows else ""


def configs(runs: Mapping[str, RunRecord]) -> str:
    """Every option of every run, folded away."""
    parts = []
    for name, run in runs.items():
        text = json.dumps({"config": run.config, "machine": run.machine}, indent=2)
        parts.append(
            f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        )
    return f'<div class="card">{"".join(parts)}</div>'
