"""The paper's figures (a) to (f) from the runs of a study, and a page that judges each.

A sentence under every figure says whether the paper's ordering holds here. Losses within
``SPREAD``, the median difference of two seeds in docs/results/methods.md, count as level.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tabulate import tabulate

from .draw import Panel, draw_panels
from .figure_runs import SWITCHED, list_figure_settings, read_figure_runs
from .more_runs import RATE
from .plan import SMALLER, Study
from .tables import name_run, read_facts

SPREAD = 0.0006
OURS = "sparsedm"
MEASURES = (("held-out loss", "loss", True), ("FD-SmallResNet", "distance", False))
Rows = Sequence[Mapping[str, Any]]
Table = Mapping[str, Mapping[str, float]]
"""Name of a line -> ratio -> value."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: its letter, its title, its panels, and the verdict in words."""

    letter: str
    title: str
    panels: Callable[[Study, Rows], list[Panel]]
    judge: Callable[[Study, Rows], str]


def write_figures(study: Study) -> None:
    """Writes a PNG per figure, figures.json and figures.md into the folder of the study."""
    runs, facts = read_figure_runs(study), read_facts(study)
    (study.out / "figures.json").write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")
    parts = [f"# The paper's figures at a small scale\n\n{describe_runs(study, facts)}"]
    missing = len(list_figure_settings(study)) - len(runs)
    if missing:
        parts.append(f"**{missing} runs have not finished**; the same command goes on.")
    for figure in FIGURES:
        name = f"figures/{figure.letter}.png"
        draw_panels(study.out / name, figure.panels(study, runs))
        about = f"`{make_command(study)}`, commit {facts['commit']}, {facts['machine']}."
        parts.append(
            f"## ({figure.letter}) {figure.title}\n\n![{figure.title}]({name})\n\n"
            f"*{about}*\n\n{figure.judge(study, runs)}"
        )
    parts.append(f"## All runs\n\n{format_runs(runs)}")
    (study.out / "figures.md").write_text("\n\n".join(parts) + "\n")
    print((study.out / "figures.md").read_text())


def make_command(study: Study) -> str:
    """Returns the command that drew the figures, with the names of files alone."""
    words = ["python", "benchmarks/figures.py", "--data", study.data.rpartition("/")[2]]
    words += ["--held-out", study.held_out.rpartition("/")[2]]
    words += [] if study.size is None else ["--size", f"{study.size}"]
    words += [] if study.teacher is None else ["--teacher", study.teacher.as_posix()]
    words += [] if study.device == "cpu" else ["--device", study.device]
    return shlex.join(words)


def describe_runs(study: Study, facts: Mapping[str, Any]) -> str:
    """Returns how the runs were trained and scored, in a few sentences."""
    budget, judge = study.budget, facts["judge"]
    size = "" if study.size is None else f" at {study.size}x{study.size}"
    return (
        f"A U-ViT of width {budget.width} and depth {budget.depth} on {facts['data']}{size}; every "
        f"student starts from one dense model and sees {budget.images:,} images at a learning rate "
        f"of {RATE:g}, one seed. Diff-Pruning cuts that model's channels; narrow models start from "
        'random weights, "narrow-long" with the images of the dense model as well. FD: '
        f"Fréchet distance of {budget.samples} samples of {budget.steps} steps on the features of "
        f"a small classifier of the same images (accuracy {judge['accuracy']:.2f}); it is no FID; "
        f"{judge['count']} real training images score {judge['floor']:.2f}. Losses within {SPREAD} "
        "of each other count as level. Every value: [figures.json](figures.json)."
    )


def tabulate_runs(runs: Rows, key: str, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns a value of the runs of some methods, by method and ratio."""
    table: dict[str, dict[str, float]] = {method: {} for method in methods}
    for run in runs:
        if run["method"] in table and run["pattern"] and run[key] is not None:
            table[run["method"]][run["pattern"]] = run[key]
    return table


def find_dense(runs: Rows, key: str) -> float | None:
    """Returns a value of the dense model that trained as long; None where it has not run."""
    return next((run[key] for run in runs if run["method"] == "dense"), None)


def draw_by_ratio(*methods: str, ratios: Sequence[str] | None = None) -> Any:
    """Returns the function of the panels of loss and FD over ratios, a line per method."""

    def make_panels(study: Study, runs: Rows) -> list[Panel]:
        ticks = [ratio for ratio in study.budget.ratios if ratios is None or ratio in ratios]
        panels = []
        for title, key, log in MEASURES:
            table = tabulate_runs(runs, key, methods)
            lines = {
                method: [(i, row[ratio]) for i, ratio in enumerate(ticks) if ratio in row]
                for method, row in table.items()
            }
            level = find_dense(runs, key)
            panels.append(Panel(title, "ratio", title, lines, ticks, log_y=log, level=level))
        return panels

    return make_panels


def draw_by_macs(study: Study, runs: Rows) -> list[Panel]:
    """Returns the panels of loss and FD over MACs, a line per kind of model."""
    panels = []
    for title, key, log in MEASURES:
        lines: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            if run["method"] in (OURS, "asp", "obs-distill", *SMALLER):
                lines.setdefault(name_run(run), []).append((run["macs"] / 1e6, run[key]))
        lines = {name: sorted(points) for name, points in lines.items()}
        level = find_dense(runs, key)
        panels.append(
            Panel(title, "MACs, millions", title, lines, log_x=True, log_y=log, level=level)
        )
    return panels


def find_curved(runs: Rows) -> list[str]:
    """Returns the ratios whose runs measured the held-out loss on their way."""
    return list(dict.fromkeys(run["pattern"] for run in runs if "held_out_every" in run))


def draw_curves(study: Study, runs: Rows) -> list[Panel]:
    """Returns a panel per ratio: the held-out losses of sparsedm and STE while they train."""
    panels = []
    for ratio in find_curved(runs):
        lines = {
            run["method"]: [(images, loss) for images, loss in run["curve"] if images]
            for run in runs
            if run["method"] in (OURS, "ste") and run["pattern"] == ratio
        }
        level = find_dense(runs, "loss")
        panels.append(Panel(ratio, "images", "held-out loss", lines, log_y=True, level=level))
    return panels


def compare(table: Table, method: str, other: str) -> str:
    """Returns at how many ratios the loss of a method is below another's, and the differences."""
    ratios = [ratio for ratio in table[method] if ratio in table[other]]
    gaps = {ratio: table[other][ratio] - table[method][ratio] for ratio in ratios}
    below = [ratio for ratio, gap in gaps.items() if gap > SPREAD]
    above = [ratio for ratio, gap in gaps.items() if gap < -SPREAD]
    level = len(gaps) - len(below) - len(above)
    words = [
        f"{method} is below {other} at {len(below)} of {len(gaps)} ratios"
        + (f" ({', '.join(below)})" if below else ""),
        f"above at {len(above)}" + (f" ({', '.join(above)})" if above else ""),
        f"level at {level}",
    ]
    return ", ".join(words)


def judge_order(claim: str, method: str, other: str) -> Callable[[Study, Rows], str]:
    """Returns the function of the verdict on the claim that ``method`` ends below ``other``."""

    def judge(study: Study, runs: Rows) -> str:
        table = tabulate_runs(runs, "loss", (method, other))
        ratios = [ratio for ratio in table[method] if ratio in table[other]]
        if not ratios:
            return f"{claim} Not judged: no runs of both have finished."
        wins = sum(table[other][ratio] - table[method][ratio] > SPREAD for ratio in ratios)
        word = "holds" if wins == len(ratios) else "does not hold" if not wins else "holds in part"
        return f"{claim} **It {word} here**: in loss {compare(table, method, other)}."

    return judge


def judge_ratios(study: Study, runs: Rows) -> str:
    """Returns whether quality falls with every step to a sparser ratio, and from where."""
    claim = "The paper: mild ratios match the dense model, and quality falls with sparser ones."
    losses = tabulate_runs(runs, "loss", (OURS,))[OURS]
    order = [ratio for ratio in study.budget.ratios if ratio in losses]
    dense = find_dense(runs, "loss")
    if order != [*study.budget.ratios] or dense is None:
        return f"{claim} Not judged: not all ratios have run."
    level = [ratio for ratio in order if losses[ratio] - dense <= SPREAD]
    falls = [b for a, b in pairwise(order) if losses[b] < losses[a] - SPREAD]
    start = f"at {', '.join(level)} the loss is within {SPREAD} of the dense model's or below"
    word = "holds" if level and not falls else "does not hold"
    rises = "and it rises from there on" if not falls else f"but it falls to {', '.join(falls)}"
    start = start if level else "no ratio is as good as the dense model"
    return f"{claim} **It {word} here**: {start} ({dense:.4f}), {rises}."


def judge_curves(study: Study, runs: Rows) -> str:
    """Returns at how many points of the curves, beside the first, sparsedm is below STE."""
    claim = "The paper: SparseDM is below STE while both train, and at the end."
    curves = {(run["method"], run["pattern"]): dict(run["curve"]) for run in runs}
    words, wins = [], []
    for ratio in find_curved(runs):
        ours, ste = (curves.get((method, ratio), {}) for method in (OURS, "ste"))
        shared = [images for images in ours if images and images in ste]
        below = [ours[images] < ste[images] - SPREAD for images in shared]
        above = [ours[images] > ste[images] + SPREAD for images in shared]
        wins += below
        if shared:
            words.append(
                f"at {ratio} below at {sum(below)} and above at {sum(above)} of {len(shared)}"
            )
    if not words:
        return f"{claim} Not judged: no runs of both have finished."
    word = "holds" if all(wins) else "does not hold" if not any(wins) else "holds in part"
    return f"{claim} **It {word} here**: {', '.join(words)} measured points."


def judge_all(*judges: Callable[[Study, Rows], str]) -> Callable[[Study, Rows], str]:
    """Returns the function of several verdicts, one after the other."""
    return lambda study, runs: " ".join(judge(study, runs) for judge in judges)


def format_runs(runs: Rows) -> str:
    """Returns a table with a line per run, in the order of ratios."""
    body = [
        [
            run["pattern"] or "dense",
            name_run(run),
            f"{run['macs'] / 1e6:.2f} M",
            f"{run['images']:,}",
            f"{run['loss']:.4f}",
            f"{run['distance']:.2f}",
        ]
        for run in runs
    ]
    head = ("ratio, or of whose MACs", "method", "MACs", "images", "held-out loss", "FD")
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


FIGURES = (
    Figure("a", "Loss and FD over the ratios", draw_by_ratio(OURS), judge_ratios),
    Figure(
        "b",
        "Masks of one ratio beside ratios switched in stages",
        draw_by_ratio(OURS, "ste", "progressive", "transfer", ratios=SWITCHED),
        judge_all(
            judge_order("The paper: one ratio throughout beats switching.", "ste", "progressive"),
            judge_order(
                "It trains a student per stage, each taught by the one before.", "transfer", OURS
            ),
        ),
    ),
    Figure(
        "c",
        "Smaller dense models of as many MACs",
        draw_by_macs,
        judge_all(
            judge_order("The paper: SparseDM beats Diff-Pruning.", OURS, "diff-pruning"),
            judge_order(
                "Against a narrow model from random weights with the same images:", OURS, "narrow"
            ),
            judge_order(
                "Against a narrow model with the teacher's images as well:", OURS, "narrow-long"
            ),
        ),
    ),
    Figure(
        "d",
        "Learning curves beside STE",
        draw_curves,
        judge_curves,
    ),
    Figure(
        "e",
        "Ratios by method",
        draw_by_ratio(OURS, "ste"),
        judge_order("The paper: SparseDM is ahead of STE at every ratio.", OURS, "ste"),
    ),
    Figure(
        "f",
        "Untrained masks, STE and SparseDM",
        draw_by_ratio("untrained", "ste", OURS),
        judge_all(
            judge_order("The paper: training is what makes masks usable.", "ste", "untrained"),
            judge_order("And:", OURS, "untrained"),
        ),
    ),
)
