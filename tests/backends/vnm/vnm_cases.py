"""Packed V:n:m weights for tests, and the bound that half-precision products keep to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsedm_compiler import Pattern
from sparsedm_compiler.backends.vnm.format import pack
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask

PATTERNS = ("64:2:8", "128:2:16", "16:1:8", "32:2:4", "48:2:16", "32:1:32", "16:2:10")
HALVES = (torch.bfloat16, torch.float16)
SMALL = (32, 2, 1, 3)
"""A tile of few threads: 32 tokens for each of 2 warps."""


@dataclass(frozen=True)
class Held:
    """A masked weight, dense and packed."""

    dense: Tensor
    packed: Tensor
    pattern: Pattern

    def arguments(
        self, tile: tuple[int, int, int, int] = SMALL, feature_major: bool = False
    ) -> dict[str, Any]:
        """The arguments of vnm_linear behind ``act``."""
        return {
            "n": self.pattern.n,
            "m": self.pattern.m,
            "rows_per_block": self.pattern.height,
            "tile": list(tile),
            "feature_major": feature_major,
        }


def held(text: str, rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Held:
    """A random weight of ``rows`` x ``cols``."""
    pattern = Pattern.parse(text)
    torch.manual_seed(seed)
    weight = torch.randn(rows, cols).to(dtype)
    mask = nm_mask(weight, pattern)
    return Held(apply_mask(weight, mask), pack(apply_mask(weight, mask), mask, pattern), pattern)
