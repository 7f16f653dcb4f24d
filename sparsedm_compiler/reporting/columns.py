"""Columns of a table, whose numbers share one format: decimals and unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from .grouping import ABSENT
from .html import Cell
from .run_record import Macs

MOST_DECIMALS = 6
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its head and its cells."""

    head: Cell
    cells: Sequence[Cell]

    @property
    def is_empty(self) -> bool:
        """Whether no cell has a value."""
        return all(cell.text == ABSENT for cell in self.cells)


def average(values: Sequence[float | None]) -> float | None:
    """Returns the mean of the known values, None where there are none."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def make_number_cells(
    rows: Sequence[Sequence[float | None]], *, digits: int = 4, unit: str = ""
) -> list[Cell]:
    """Returns a cell for every row of values: its value, or mean and standard deviation of several.

    None is left out. All cells have as many decimals, ``digits`` significant ones for the smallest.
    """
    decimals = count_decimals([middle for row in rows if (middle := average(row))], digits)
    return [make_number_cell(row, decimals, unit) for row in rows]


def make_number_cell(values: Sequence[float | None], decimals: int, unit: str) -> Cell:
    """Returns the cell of one row, with all digits on hover."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell(ABSENT)
    middle, title = mean(known), ", ".join(map(repr, known))
    text = format_number(middle, decimals)
    value = middle if math.isfinite(middle) else None
    if len(known) == 1:
        return Cell(text + unit, value=value, title=title)
    text = f"{text} ± {stdev(known):,.{decimals}f}{unit}"
    return Cell(text, f"n = {len(known)}", value, title)


def count_decimals(numbers: Sequence[float], digits: int) -> int:
    """Returns the decimals that give the smallest number ``digits`` significant digits.

    A number below a hundredth of the largest does not count, nor do zero, NaN and Inf.

    >>> count_decimals([0.0786, 0.9], 4), count_decimals([12345.6], 3), count_decimals([], 3)
    (5, 0, 0)
    """
    sizes = [abs(number) for number in numbers if number and math.isfinite(number)]
    if not sizes:
        return 0
    smallest = max(min(sizes), max(sizes) / 100)
    return min(max(digits - 1 - math.floor(math.log10(smallest)), 0), MOST_DECIMALS)


def format_number(value: float, decimals: int) -> str:
    """Returns ``value`` with that many decimals; in powers of ten where nothing else is left.

    >>> format_number(0.07, 4), format_number(12345.6, 0), format_number(0.00012, 2)
    ('0.0700', '12,346', '1.2e-04')
    """
    if value and abs(value) < 0.5 * 10.0**-decimals:
        return f"{value:.1e}"
    return f"{value:,.{decimals}f}"


def make_macs_cells(rows: Sequence[Macs | None]) -> list[Cell]:
    """Returns the MACs before and after pruning, in one unit; all digits on hover."""
    most = max((macs.dense for macs in rows if macs is not None), default=0)
    size, unit = next((entry for entry in UNITS if most >= entry[0]), (1, ""))
    cells = []
    for macs in rows:
        if macs is None:
            cells.append(Cell(ABSENT))
            continue
        dense, sparse = (
            format_number(value / size, 2 if unit else 0) for value in (macs.dense, macs.sparse)
        )
        title = f"{macs.dense:,} → {macs.sparse:,}; attention apart: {macs.attention:,}"
        ratio = f"÷ {macs.dense / max(macs.sparse, 1):.2f}"
        cells.append(Cell(f"{dense} → {sparse} {unit}".strip(), ratio, macs.sparse, title))
    return cells
