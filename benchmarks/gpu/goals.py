"""What the numbers were meant to show, judged one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from .results import Results

MET, MISSED, OPEN = "met", "MISSED", "not measured"
NEVER_SLOWER = 0.98
WIDE, LONG = 2048, 4096


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal with what came of it."""

    goal: str
    status: str
    detail: str


Point = tuple[float, str]
"""A median ratio, and of what."""


def judge_goals(results: Results) -> list[Verdict]:
    """Every goal; a rehearsal judges none."""
    verdicts = [judge(results) for judge in GOALS]
    if results["rehearsal"]:
        return [Verdict(verdict.goal, OPEN, "a rehearsal measures nothing") for verdict in verdicts]
    return verdicts


def gated(results: Results) -> list[Point]:
    """Everything that the gate decides, over compiled dense: what a user would get."""
    points = models(results)
    for row in results["table"]:
        points.append((row["over_compiled"][1], f"table: {row['key']}"))
    for row in results["ops"]:
        for text, cell in row["patterns"].items():
            if cell.get("gated") == "sparse":
                points.append((cell["ratio"][1], f"{row['key']} at {text}"))
    return points


def models(results: Results) -> list[Point]:
    """Whole models."""
    return [
        (cell["ratio"][1], f"{row['key']} at {text}")
        for row in results["models"]
        for text, cell in row["patterns"].items()
        if "ratio" in cell
    ]


def ops(results: Results, pattern: str, width: int) -> list[Point]:
    """Layers of that width at least, in and out, for many tokens."""
    return [
        (row["patterns"][pattern]["ratio"][1], row["key"])
        for row in results["ops"]
        if row["tokens"] >= LONG and min(row["rows"], row["cols"]) >= width
        if "ratio" in row["patterns"].get(pattern, {})
    ]


def at_least(goal: str, bound: float, points: Iterable[Point]) -> Verdict:
    """All of them; told with the median and the lowest."""
    points = sorted(points)
    if not points:
        return Verdict(goal, OPEN, "")
    below = [name for value, name in points if value < bound]
    detail = (
        f"lowest {points[0][0]:.3f} ({points[0][1]}), median {median(v for v, _ in points):.3f} "
        f"of {len(points)}"
    )
    if below:
        detail += f"; {len(below)} below {bound:g}"
    return Verdict(goal, MISSED if below else MET, detail)


def best_of(goal: str, bound: float, points: Iterable[Point]) -> Verdict:
    """The largest of them."""
    points = sorted(points)
    if not points:
        return Verdict(goal, OPEN, "")
    value, name = points[-1]
    return Verdict(goal, MET if value >= bound else MISSED, f"{value:.3f} ({name})")


def never_slower(results: Results) -> Verdict:
    goal = f"gated, no layer, block or model is below {NEVER_SLOWER} of compiled dense"
    return at_least(goal, NEVER_SLOWER, gated(results))


def semi(results: Results) -> Verdict:
    goal = f"2:4 layers >= 1.3 over cuBLASLt, {LONG} tokens and width {WIDE} up"
    return at_least(goal, 1.3, ops(results, "2:4", WIDE))


def blocks(pattern: str, bound: float) -> Callable[[Results], Verdict]:
    goal = f"{pattern} layers >= {bound} over cuBLASLt, {LONG} tokens and width 1024 up"
    return lambda results: at_least(goal, bound, ops(results, pattern, 1024))


def table_over(key: str, bound: float) -> Callable[[Results], Verdict]:
    goal = f"the table's best cell >= {bound} {key.replace('_', ' ')}"
    return lambda results: best_of(
        goal, bound, [(row[key][1], row["key"]) for row in results["table"]]
    )


def every_cell(results: Results) -> Verdict:
    goal = "every cell of the table >= 1.0 over eager"
    return at_least(goal, 1.0, [(row["over_eager"][1], row["key"]) for row in results["table"]])


def above_paper(results: Results) -> Verdict:
    goal = "every cell of the table above the paper's (ratio of the two)"
    rows = [row for row in results["table"] if row["paper"] is not None]
    return at_least(goal, 1.0, [(row["over_eager"][1] / row["paper"], row["key"]) for row in rows])


def first_call(results: Results) -> Verdict:
    goal = "with empty caches, the best first call of a student <= 1.3 of compiled dense's own"
    points = []
    for row in results["first_call"]:
        seconds = {
            name: cell["wall_s"] for name, cell in row["variants"].items() if "wall_s" in cell
        }
        dense = seconds.pop("dense", None)
        if dense and seconds:
            name = min(seconds, key=seconds.__getitem__)
            points.append((seconds[name] / dense, f"{row['key']}, {name}"))
    if not points:
        return Verdict(goal, OPEN, "")
    value, name = max(points)
    return Verdict(goal, MET if value <= 1.3 else MISSED, f"highest {value:.2f} ({name})")


def step(results: Results) -> Verdict:
    goal, points = "a masked training step <= 1.05 of a dense one", list[Point]()
    for row in results["training"]:
        for text, cell in row["patterns"].items():
            for kind, quartiles in cell.get("step", {}).items():
                if kind not in ("sparse", "frozen"):  # which must be asked for
                    points.append((quartiles[1], f"{row['key']} at {text}, {kind}"))
    if not points:
        return Verdict(goal, OPEN, "")
    value, name = max(points)
    return Verdict(goal, MET if value <= 1.05 else MISSED, f"highest {value:.3f} ({name})")


def frozen_step(results: Results) -> Verdict:
    goal = "a training step with frozen 1:4 blocks >= 1.2 over dense, DiT-XL/2's width"
    points = [
        (1 / cell["step"]["frozen"][1], f"{row['key']} at {text}")
        for row in results["training"]
        for text, cell in row["patterns"].items()
        if "DiT-XL" in row["model"] and text.startswith("1:4@") and "frozen" in cell.get("step", {})
    ]
    return at_least(goal, 1.2, points)


def tests(results: Results) -> Verdict:
    goal, outcomes = "all tests marked gpu pass", results["tests"]
    if not outcomes or not (outcomes["passed"] or outcomes["failed"]):
        return Verdict(goal, OPEN, "")
    counts = {key: len(outcomes[key]) for key in ("passed", "failed", "skipped", "left_out")}
    said = ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in counts.items())
    if outcomes["stopped"]:
        said += "; then the time was up"
    good = OPEN if outcomes["stopped"] else MET
    return Verdict(goal, MISSED if outcomes["failed"] else good, said)


GOALS: tuple[Callable[[dict[str, Any]], Verdict], ...] = (
    tests,
    never_slower,
    semi,
    blocks("1:2@64x16", 1.5),
    blocks("1:4@128x16", 2.0),
    blocks("1:8@128x16", 2.5),
    every_cell,
    above_paper,
    table_over("over_eager", 1.45),
    table_over("over_compiled", 1.3),
    first_call,
    step,
    frozen_step,
)
