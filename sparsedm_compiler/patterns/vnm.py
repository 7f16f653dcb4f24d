"""``VNM``, spelled "V:n:m": V rows share 4 columns of every m, and each row keeps n of those."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from ..errors import PatternError
from ..selection.top_n import select_top_n
from .pattern import NUMBER, Pattern, register_pattern
from .per_row import NM
from .shared_rows import sum_column_energy

SHARED_COLUMNS = 4
"""Columns of every m that the rows of a V:n:m block share (VENOM, Castro et al. 2023)."""


@register_pattern
@final
@dataclass(frozen=True, slots=True)
class VNM(Pattern):
    """V:n:m sparsity (VENOM, Castro et al. 2023).

    Of every ``m`` columns, ``rows`` consecutive output rows share the 4 whose sums of squares are
    the largest; each row keeps its ``n`` largest weights of those 4.

    Attributes:
        n: Weights that a row keeps of its 4 columns.
        m: Consecutive input channels of a group.
        rows: V, the number of consecutive output rows that share the choice of columns.

    Raises:
        PatternError: Unless 0 < ``n`` <= 4 <= ``m`` and ``rows`` >= 1.

    Example:
        >>> str(VNM(2, 8, rows=64))
        '64:2:8'
    """

    rows: int

    SPELLING: ClassVar[re.Pattern[str]] = re.compile(rf"{NUMBER}:{NUMBER}:{NUMBER}")
    EXPLANATION: ClassVar[str] = "'64:2:8' is V:n:m"

    def __post_init__(self) -> None:
        Pattern.__post_init__(self)
        if self.rows < 1:
            raise PatternError(
                f"pattern '{self}' shares its columns among {self.rows} rows, not >= 1"
            )
        if not self.n <= SHARED_COLUMNS <= self.m:
            raise PatternError(
                f"pattern '{self}' is not V:n:m with n <= {SHARED_COLUMNS} <= m: each row keeps n "
                f"of the {SHARED_COLUMNS} columns its block shares, e.g. '64:2:8'"
            )

    @classmethod
    def from_match(cls, match: re.Match[str]) -> VNM:
        rows, n, m = map(int, match.groups())
        return VNM(n, m, rows)

    @property
    def height(self) -> int:
        return self.rows

    @property
    def most_n(self) -> int:
        return SHARED_COLUMNS

    @property
    def height_label(self) -> str:
        return f"the {self.rows} shared rows"

    def implied(self) -> tuple[Pattern, ...]:
        return (NM(self.n, self.m),)

    def compute_mask(self, weight: Tensor) -> Tensor:
        energy = sum_column_energy(weight, self.rows)
        columns = select_top_n(energy, SHARED_COLUMNS, self.m)
        return select_top_n(weight, self.n, self.m, columns)

    def __str__(self) -> str:
        return f"{self.rows}:{self.n}:{self.m}"
