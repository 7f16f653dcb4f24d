"""The table of results on a report page: a row for every group of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..evaluate.score import ScoreKey
from .columns import Column, average, make_macs_cells, make_number_cells
from .grouping import SeedGroup
from .html import Cell, Link, make_table
from .run_record import RunRecord, look_up_option

BETTER = {
    **dict.fromkeys(("FD", "FID", "KID"), "lower is better"),
    **dict.fromkeys(("IS", "precision", "recall", "density", "coverage"), "higher is better"),
}
MEASURE_SPEED = "sparsedm bench RUN measures the speed"
Pick = Callable[[RunRecord], float | None]


def make_results(groups: Sequence[SeedGroup], anchors: Mapping[str, Sequence[Link]]) -> str:
    """Returns the table of results, one row per group, with notes on its columns.

    ``anchors``: run -> links to its configuration and, where it has one, to its sample grid.
    """
    keys = [
        *dict.fromkeys(
            score.key for group in groups for run in group.runs.values() for score in run.scores
        )
    ]
    columns = [
        *make_name_columns(groups, anchors),
        *make_quality_columns(groups, keys),
        *make_cost_columns(groups),
    ]
    shown = [column for column in columns if not column.is_empty]
    missing = [column.head.text for column in columns if column.is_empty]
    rows = [list(row) for row in zip(*(column.cells for column in shown), strict=True)]
    notes = [*make_notes(groups, keys, shown), *describe_missing(missing)]
    return make_table([column.head for column in shown], rows, notes=notes)


def make_name_columns(
    groups: Sequence[SeedGroup], anchors: Mapping[str, Sequence[Link]]
) -> list[Column]:
    """Returns the columns that say which runs a row is of, and how far they are."""
    ranks = {group.first.pattern: float(rank) for rank, group in enumerate(groups)}
    runs, images = [], []
    for group in groups:
        run, links = group.first, [anchors[name] for name in group.runs]
        badge = "" if run.finished else "unfinished"
        samples = tuple(link for _, *more in links for link in more)[:1]
        seeds = tuple(
            Link(f"seed {member.seed}", link.anchor)
            for member, (link, *_) in zip(group.runs.values(), links, strict=True)
        )
        names = ", ".join(group.runs)
        cell = Cell(names, left=True, badge=badge, title=names, link=links[0][0])
        runs.append(replace(cell, more=(*seeds[1:], *samples)))
        total = "" if run.finished or run.goal is None else f"of {run.goal:,}"
        images.append(Cell(f"{run.images:,}", total, run.images))
    methods = [Cell(group.first.method, left=True) for group in groups]
    patterns = [
        Cell(pattern or "dense", value=ranks[pattern], left=True)
        for pattern in (group.first.pattern for group in groups)
    ]
    lists = [sorted(run.seed for run in group.runs.values()) for group in groups]
    numbers = [Cell(", ".join(map(str, seeds)), value=seeds[0]) for seeds in lists]
    return [
        Column(Cell("run", left=True), runs),
        Column(Cell("method", left=True, pick=True), methods),
        Column(Cell("pattern", left=True, pick=True), patterns),
        Column(Cell("seed"), numbers),
        Column(Cell("images"), images),
    ]


def make_quality_columns(groups: Sequence[SeedGroup], keys: Sequence[ScoreKey]) -> list[Column]:
    """Returns the columns of held-out losses and scores, the best of every pattern marked."""
    columns = [
        make_quality_column("held-out loss", groups, get_held_out_loss, lower=True),
        make_quality_column("of the EMA", groups, get_ema_loss, lower=True),
    ]
    for number, key in enumerate(keys, 1):
        title, hint = f"{name_score(key)} [{number}]", BETTER.get(key.metric)
        lower = None if hint is None else hint.startswith("lower")
        columns.append(make_quality_column(title, groups, make_score_getter(key), lower=lower))
    return columns


def get_held_out_loss(run: RunRecord) -> float | None:
    """Returns the last held-out loss of the student."""
    return None if run.held_out is None else run.held_out.held_out


def get_ema_loss(run: RunRecord) -> float | None:
    """Returns the last held-out loss of the EMA."""
    return None if run.held_out is None else run.held_out.held_out_ema


def make_score_getter(key: ScoreKey) -> Pick:
    """Returns a function that returns a run's score with that key."""
    return lambda run: run.find_score(key)


def make_quality_column(
    title: str, groups: Sequence[SeedGroup], pick: Pick, *, lower: bool | None
) -> Column:
    """Returns the column of a measure; ``lower``: lower is better, None where that is unknown."""
    rows = [[pick(run) for run in group.runs.values()] for group in groups]
    cells = make_number_cells(rows)
    if lower is not None:
        for index in find_best(groups, [average(row) for row in rows], lower=lower):
            cells[index] = replace(cells[index], best=True)
    return Column(Cell(title), cells)


def find_best(
    groups: Sequence[SeedGroup], values: Sequence[float | None], *, lower: bool
) -> list[int]:
    """Returns the indices of the best values of every pattern; none where all are equal.

    Only finished runs with the same pattern, model, data and objective are compared.
    """
    contests: dict[str, list[int]] = {}
    for index, (group, value) in enumerate(zip(groups, values, strict=True)):
        run = group.first
        if run.finished and value is not None and math.isfinite(value):
            alike = [run.pattern, look_up_option(run.config, "objective")]
            alike += [run.config.get("model"), run.config.get("data")]
            key = json.dumps(alike, default=str, sort_keys=True)
            contests.setdefault(key, []).append(index)
    best = []
    for indices in contests.values():
        numbers = {index: value for index in indices if (value := values[index]) is not None}
        winner = min(numbers.values()) if lower else max(numbers.values())
        if len({*numbers.values()}) > 1:
            best += [index for index, value in numbers.items() if value == winner]
    return best


def make_cost_columns(groups: Sequence[SeedGroup]) -> list[Column]:
    """Returns the columns of MACs, of the speed-up, and of the speed of the training."""
    runs = [[*group.runs.values()] for group in groups]
    ratios = [[None if r.speedup is None else r.speedup.ratio for r in row] for row in runs]
    rates = [[run.images_per_second or None for run in row] for row in runs]
    seconds = [[run.compile_seconds for run in row] for row in runs]
    return [
        Column(Cell("MACs"), make_macs_cells([group.first.macs for group in groups])),
        Column(Cell("speed"), make_number_cells(ratios, digits=3, unit="x")),
        Column(Cell("images/s"), make_number_cells(rates, digits=3)),
        Column(Cell("compile time"), make_number_cells(seconds, digits=2, unit=" s")),
    ]


def make_notes(
    groups: Sequence[SeedGroup], keys: Sequence[ScoreKey], shown: Sequence[Column]
) -> list[str]:
    """Returns the notes on the columns that are shown."""
    heads = {column.head.text for column in shown}
    notes = [f"[{number}] {describe_score(key)}" for number, key in enumerate(keys, 1)]
    if "held-out loss" in heads:
        notes.append(
            "Held-out loss: the denoising error on data never trained on, of the student and of "
            "the exponential moving average (EMA) of its weights; lower is better."
        )
    if any(cell.best for column in shown for cell in column.cells):
        notes.append(
            "Best: of the finished runs with the same pattern, model, data and objective, by the "
            "mean, whatever the spread."
        )
    if "MACs" in heads:
        notes.append("MACs: conv and linear layers of one forward, dense → pruned.")
    if "images/s" in heads:
        notes.append(describe_rates([run for group in groups for run in group.runs.values()]))
    return [*notes, *describe_baselines(groups)]


def describe_rates(runs: Sequence[RunRecord]) -> str:
    """Returns the note on the training speed: whether it counts compiling."""
    timed = [run.compile_seconds is not None for run in runs if run.finished]
    median = "the median over the training steps, without the compile time"
    if all(timed):
        return f"Images/s: while training, {median}."
    whole = "with compiling, since these runs did not measure it apart"
    if not any(timed):
        return f"Images/s: over the whole training, {whole}."
    return f"Images/s: while training, {median}; where no compile time is shown, over all of it."


def describe_missing(heads: Sequence[str]) -> list[str]:
    """Returns the note on the columns that are left out since no run has a value, if any."""
    if not heads:
        return []
    cure = f" ({MEASURE_SPEED})" if "speed" in heads else ""
    return [f"Not measured in any of these runs: {', '.join(heads)}{cure}."]


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
