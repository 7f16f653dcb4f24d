"""``TransposableNM``, spelled "n:4t": the transposed weight is n:4 as well."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ..errors import PatternError
from ..selection.transposable_tiles import TILE, build_plan, select_tiles
from .pattern import Pattern, explain_patterns, register_pattern
from .per_row import NM

_N_M_T = re.compile(r"([0-9]{1,6}):([0-9]{1,6})t")


@register_pattern
@final
@dataclass(frozen=True, slots=True)
class TransposableNM(Pattern):
    """Transposable n:4 sparsity (Hubara et al. 2021).

    In every aligned 4x4 tile of [out, in] each row and each column keeps ``n``, and of all such
    masks the one with the largest sum of magnitudes is taken.

    Attributes:
        n: Weights that each row and each column of a tile keeps: 1, 2 or 3.
        m: 4.

    Raises:
        PatternError: Unless ``n`` is 1, 2 or 3 and ``m`` is 4.

    Example:
        >>> str(TransposableNM(2, 4))
        '2:4t'
    """

    SPELLING: ClassVar[re.Pattern[str]] = re.compile(r"[0-9:x]*t[0-9:xt]*")
    EXPLANATION: ClassVar[str] = "'2:4t' 2 of 4 of the rows and of the columns"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m == TILE:
            raise _make_error(str(self))

    @classmethod
    def from_match(cls, match: re.Match[str]) -> TransposableNM:
        numbers = _N_M_T.fullmatch(match.group())
        if numbers is None:
            raise _make_error(match.group())
        n, m = map(int, numbers.groups())
        return TransposableNM(n, m)

    @property
    def height(self) -> int:
        return TILE

    def implied(self) -> tuple[Pattern, ...]:
        return (NM(self.n, self.m),)

    def compute_mask(self, weight: Tensor) -> Tensor:
        return select_tiles(weight, self.n)

    def prepare(self, device: torch.device) -> None:
        build_plan(self.n, device)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}t"


def _make_error(text: str) -> PatternError:
    """Returns the error for a text that spells no transposable pattern."""
    return PatternError(
        f"pattern {text!r} is not one of '1:4t', '2:4t' and '3:4t', which alone are transposable; "
        f"{explain_patterns()}"
    )
