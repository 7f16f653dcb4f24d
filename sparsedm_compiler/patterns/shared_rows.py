"""``SharedNM``, spelled "n:mxR": R consecutive output rows share one mask."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ..errors import PatternError
from ..selection.top_n import select_top_n
from .pattern import NUMBER, Pattern, explain_patterns, register_pattern
from .per_row import NM


@register_pattern
@final
@dataclass(frozen=True, slots=True)
class SharedNM(Pattern):
    """N:M sparsity whose masks are shared by consecutive output rows (vector-wise N:M).

    A group keeps the ``n`` columns whose sums of squares over the rows are the largest; of equal
    sums the lowest index wins. With one row it is ``NM``, as which ``parse`` reads it.

    Attributes:
        n: Columns that a group keeps.
        m: Consecutive input channels of a group.
        rows: R, the number of consecutive output rows that share one mask.

    Raises:
        PatternError: Unless 0 < ``n`` <= ``m`` and ``rows`` >= 1.

    Example:
        >>> str(SharedNM(1, 8, rows=16))
        '1:8x16'
    """

    rows: int

    SPELLING: ClassVar[re.Pattern[str]] = re.compile(rf"{NUMBER}:{NUMBER}x{NUMBER}")
    EXPLANATION: ClassVar[str] = "'1:8x16' shares a mask among 16 rows"

    def __post_init__(self) -> None:
        Pattern.__post_init__(self)
        if self.rows < 1:
            raise PatternError(
                f"pattern '{self}' shares its mask among {self.rows} rows, not >= 1; "
                f"{explain_patterns()}"
            )

    @classmethod
    def from_match(cls, match: re.Match[str]) -> NM | SharedNM:
        n, m, rows = map(int, match.groups())
        return NM(n, m) if rows == 1 else SharedNM(n, m, rows)

    @property
    def height(self) -> int:
        return self.rows

    @property
    def height_label(self) -> str:
        return f"the {self.rows} shared rows"

    def implied(self) -> tuple[Pattern, ...]:
        return (NM(self.n, self.m),)

    def compute_mask(self, weight: Tensor) -> Tensor:
        mask = torch.empty_like(weight, dtype=torch.bool)
        blocks = torch.unflatten(mask, 0, (-1, self.rows))
        energy = sum_column_energy(weight, self.rows)
        blocks.copy_(select_top_n(energy, self.n, self.m).unsqueeze(1))
        return mask

    def __str__(self) -> str:
        return f"{self.n}:{self.m}x{self.rows}"


def sum_column_energy(weight: Tensor, rows: int) -> Tensor:
    """Returns sums of squares over every ``rows`` output rows: [out / rows, in, *kernel].

    They are float64 for a float64 weight and float32 for any other.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.unflatten(weight.to(wide).square(), 0, (-1, rows)).sum(1)
