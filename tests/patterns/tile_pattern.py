"""A kind of pattern that the package does not have: the largest weights of square tiles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from sparsedm_compiler.patterns import Pattern
from sparsedm_compiler.selection.top_n import select_top_n


@final
@dataclass(frozen=True, slots=True)
class TileTopN(Pattern):
    """Of every m x m tile the n * m largest weights are kept, wherever they lie."""

    SPELLING: ClassVar[re.Pattern[str]] = re.compile(r"(\d+):(\d+)u")
    EXPLANATION: ClassVar[str] = "'1:4u' keeps 4 of the 16 of a tile"

    @classmethod
    def from_match(cls, match: re.Match[str]) -> TileTopN:
        return TileTopN(int(match[1]), int(match[2]))

    @property
    def height(self) -> int:
        return self.m

    def compute_mask(self, weight: Tensor) -> Tensor:
        tiles = weight.unflatten(1, (-1, self.m)).unflatten(0, (-1, self.m)).movedim(1, 2)
        mask = select_top_n(tiles.flatten(2, 3).flatten(0, 1), self.n * self.m, self.m**2)
        mask = mask.view(tiles.shape).movedim(2, 1)
        return mask.flatten(2, 3).flatten(0, 1)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}u"
