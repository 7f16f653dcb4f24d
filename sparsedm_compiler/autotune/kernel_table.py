"""Tables of measured kernels by card, shipped with the package, so that a search can be skipped.

A table is a JSON file in ``tables/`` that ``benchmarks/gpu/kernel_table.py`` writes from results.
It is never believed without multiplying once: a kernel of it is checked against dense as any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from ..backends.kernel_family import MatmulProblem
from ..patterns import Pattern

NEAR = 2.0
"""A row stands for products whose every size is at most so many times larger or smaller."""
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class TableRow:
    """The fastest kernel of one linear layer on one card, as it was measured.

    Attributes:
        pattern: The text of the pattern of the weight.
        kernel: The kernel's name.
        tile: Its setting, as ``KernelConfig.tile``.
        tokens: Rows of x.
        cols: Input channels.
        rows: Output channels.
        act: The activation behind the product, one of ``custom_op.ACTS``.
        dense_ms: Milliseconds of dense in half precision.
        ratio: How many times faster than dense the kernel is.
    """

    pattern: str
    kernel: str
    tile: tuple[int, ...]
    tokens: int
    cols: int
    rows: int
    act: str
    dense_ms: float
    ratio: float


@dataclass(frozen=True, slots=True)
class KernelTable:
    """What was measured on one card.

    Attributes:
        card: The card's name, as its driver gives it.
        capability: Its compute capability, e.g. "9.0".
        measured: When, with which torch and at which commit.
        rows: One for each layer and pattern.
    """

    card: str
    capability: str
    measured: str
    rows: tuple[TableRow, ...]

    def find_row(
        self, pattern: Pattern, problem: MatmulProblem, shape: tuple[int, ...]
    ) -> TableRow | None:
        """Returns the row of the same pattern nearest in size; None where none is near.

        Args:
            pattern: The pattern of the weight.
            problem: The product; convolutions and other dtypes than half are in no table.
            shape: The weight's shape.
        """
        if problem.kernel or problem.dtype not in _DTYPES or len(shape) != 2:
            return None
        sizes = (math.prod(problem.inputs[:-1]), shape[1], shape[0])
        rows = [row for row in self.rows if row.pattern == str(pattern)]
        rows = [row for row in rows if (row.act == "none") == (problem.act == "none")] or rows
        nearest = min(rows, key=lambda row: _measure_distance(row, sizes), default=None)
        if nearest is None or _measure_distance(nearest, sizes) > math.log2(NEAR):
            return None
        return nearest


def _measure_distance(row: TableRow, sizes: tuple[int, int, int]) -> float:
    """Returns the largest logarithm of a ratio between sizes."""
    pairs = zip((row.tokens, row.cols, row.rows), sizes, strict=True)
    return max(abs(math.log2(ours / max(theirs, 1))) for ours, theirs in pairs)


def find_table(card: str, capability: str) -> KernelTable | None:
    """Returns the table of a card, or of another of its compute capability; None without one."""
    tables = [table for table in read_tables() if table.capability == capability]
    named = [table for table in tables if table.card == card]
    return next(iter(named or tables), None)


@cache
def read_tables() -> tuple[KernelTable, ...]:
    """Returns all tables that are shipped."""
    return tuple(map(read_table, _iterate_texts()))


def _iterate_texts() -> Iterator[str]:
    folder = files(__package__) / "tables"
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            yield file.read_text(encoding="utf-8")


def read_table(text: str) -> KernelTable:
    """Returns the table in a JSON text."""
    values: dict[str, Any] = json.loads(text)
    rows = (TableRow(**{**row, "tile": tuple(row["tile"])}) for row in values["rows"])
    return KernelTable(values["card"], values["capability"], values["measured"], tuple(rows))
