"""What was found, as one JSON file that is whole at any moment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsedm_compiler.fileio import replace_atomically

from .case import Read

SECTIONS = ("ops", "models", "table", "training", "memory", "first_call")
"""Those with rows, as they are shown; "quality" has the losses of a study (``--losses``)."""

Results = dict[str, Any]


def empty(environment: dict[str, Any], *, rehearsal: bool) -> Results:
    """Nothing yet."""
    rows: Results = {name: [] for name in SECTIONS}
    return {
        "rehearsal": rehearsal,
        "environment": environment,
        "sections": {},
        "tests": None,
        "quality": [],
        **rows,
    }


def take(results: Results, section: str, log: Read, seconds: float) -> None:
    """Put in what a section has found so far."""
    results[section] = [{"key": key, **row} for key, row in log.rows.items()]
    results["sections"][section] = {
        "seconds": round(seconds, 1),
        "stopped": log.stopped,
        "failed": log.failed,
    }


def save(results: Results, path: Path) -> None:
    """Write the file whole or not at all."""
    with replace_atomically(path) as part:
        part.write_text(json.dumps(results, indent=1) + "\n")


def load(paths: Sequence[Path]) -> Results:
    """The results of several runs as one. Raises ValueError where they are of different cards.

    Every row is of one run; a row of a later file replaces that of an earlier one.
    """
    runs = [json.loads(path.read_text()) for path in paths]
    cards = {(run["rehearsal"], run["environment"]["gpu"]) for run in runs}
    if len(cards) > 1:
        raise ValueError(f"results of different machines are not one: {sorted(map(str, cards))}")
    whole = runs[0]
    for run in runs[1:]:
        for name in SECTIONS:
            rows = {row["key"]: row for row in (*whole.get(name, ()), *run.get(name, ()))}
            whole[name] = list(rows.values())
        for name, said in run["sections"].items():
            before = whole["sections"].get(name, {"seconds": 0, "failed": {}})
            failed = {**before["failed"], **said["failed"]}
            done = {row["key"] for row in whole.get(name) or ()}
            left = {key: why for key, why in failed.items() if key not in done}
            whole["sections"][name] = {**said, "failed": left}
        whole["tests"] = run["tests"] or whole["tests"]
        whole["quality"] = run.get("quality") or whole.get("quality", [])
        if run["environment"]["commit"] not in whole["environment"]["commit"].split(", "):
            whole["environment"]["commit"] += f", {run['environment']['commit']}"
    return whole


def list_failures(results: Results) -> list[str]:
    """One sentence for everything that went wrong: tests, sections, kernels that are not right."""
    tests = results["tests"] or {"failed": {}}
    failures = [f"test {name}: {why}" for name, why in tests["failed"].items()]
    for name, said in results["sections"].items():
        failures += [f"{name}: {key}: {why}" for key, why in said["failed"].items()]
    for name in ("ops", "models", "training", "memory"):
        for row in results[name]:
            for text, cell in row["patterns"].items():
                failures += [f"{name}: {row['key']} at {text}{why}" for why in list_faults(cell)]
    return failures


def list_faults(cell: dict[str, Any]) -> Iterator[str]:
    """What went wrong at one pattern, as the ends of sentences."""
    wrong = cell.get("wrong")
    if isinstance(wrong, dict):
        yield from (f": {kernel} is wrong: {why}" for kernel, why in wrong.items())
    elif wrong:
        yield " is wrong"
    if "failed" in cell:
        yield f": {cell['failed']}"
