"""The cells of the tables of a report."""

from __future__ import annotations

from collections.abc import Sequence

from sparsedm_compiler.autotune.side_by_side import format_ratio

from .results import Results

REHEARSAL = "CPU rehearsal, not a measurement"
GONE = "–"  # noqa: RUF001
Cells = Sequence[object]


def speed(results: Results, quartiles: Sequence[float]) -> str:
    """A ratio; in a rehearsal, that there is one."""
    low, middle, high = quartiles
    return "ran" if results["rehearsal"] else format_ratio((low, middle, high))


def counts(kernels: dict[str, int]) -> str:
    """How many weights each kernel runs."""
    return ", ".join(f"{count} {name}" for name, count in sorted(kernels.items()))


def megabytes(size: int | None) -> str:
    """Bytes as MiB."""
    return GONE if size is None else f"{size / 2**20:.1f}"


def markdown(names: Cells, rows: Sequence[Cells]) -> str:
    """A table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
