"""``NM``, spelled "n:m": every output row has a mask of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from ..selection.top_n import select_top_n
from .pattern import NUMBER, Pattern, register_pattern


@register_pattern
@final
@dataclass(frozen=True, slots=True)
class NM(Pattern):
    """Per-row N:M sparsity: in every row, each group of ``m`` weights keeps the ``n`` largest.

    Of equal magnitudes the lowest index wins, so that every group keeps exactly ``n``.

    Attributes:
        n: Weights that a group keeps.
        m: Consecutive input channels of a group.

    Raises:
        PatternError: Unless 0 < ``n`` <= ``m``.

    Example:
        >>> str(NM(2, 4))
        '2:4'
    """

    SPELLING: ClassVar[re.Pattern[str]] = re.compile(rf"{NUMBER}:{NUMBER}")
    EXPLANATION: ClassVar[str] = "'2:4' keeps 2 of 4"

    @classmethod
    def from_match(cls, match: re.Match[str]) -> NM:
        n, m = map(int, match.groups())
        return NM(n, m)

    def compute_mask(self, weight: Tensor) -> Tensor:
        return select_top_n(weight, self.n, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"
