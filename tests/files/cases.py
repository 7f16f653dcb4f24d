"""Patterns of every kind, and weights whose zeros satisfy them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsedm_compiler import Pattern

PATTERNS = (
    *("1:2", "2:4", "1:4", "3:4", "1:8", "2:8", "4:8", "7:8", "1:16", "8:16", "1:32", "16:32"),
    *("2:4x4", "1:8x16", "1:2@16x8", "1:4@8x4", "1:2@16x8+2:4", "2:2@8x4+1:4"),
    *("4:2:8", "16:1:8", "8:2:16", "1:4t", "2:4t", "3:4t", "40:80"),
)
"""40:80 has more masks than 64 bits count."""


def sparse_weight(pattern: str, seed: int = 0, kernel: tuple[int, ...] = ()) -> Tensor:
    """Returns a weight of 16 rows, as wide as the pattern needs, with zeros in place."""
    parsed = Pattern.parse(pattern)
    width = parsed.width * -(-16 // parsed.width)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, width, *kernel, generator=generator)
    return torch.where(parsed.compute_mask(weight), weight, 0.0)
