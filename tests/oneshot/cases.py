"""Small layers, Hessians of real inputs, and the best pruned weight by trying every mask."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

import torch
from torch import Tensor

from sparsedm_compiler.patterns import NM, VNM, BlockNM, Pattern, SharedNM, TransposableNM

PATTERNS = (
    "2:4", "1:4", "3:4", "1:8", "8:32", "2:4x2", "1:8x4", "4:16x2", "4:2:8", "2:1:16", "4:2:32",
    "2:4t", "1:4t", "3:4t", "1:2@4x4", "2:4@2x2", "1:2@4x8+2:4", "2:2@4x4+1:4",
)  # fmt: skip
"""One of every kind, with few and with many choices per group."""


def make_weight(pattern: str, *, groups: int = 2, seed: int = 0) -> Tensor:
    """Returns a float64 matrix of ``groups`` groups of columns and two bands of rows."""
    parsed = Pattern.parse(pattern)
    source = torch.Generator().manual_seed(seed)
    size = 2 * parsed.height, groups * parsed.width
    return torch.randn(size, generator=source, dtype=torch.float64)


def make_hessian(columns: int, *, seed: int = 0, damping: float = 0.01) -> Tensor:
    """Returns E[x x^T] of correlated inputs, damped."""
    source = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(4 * columns, columns, generator=source, dtype=torch.float64)
    mixed = inputs @ torch.randn(columns, columns, generator=source, dtype=torch.float64)
    hessian = mixed.T @ mixed / len(mixed)
    return hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


def measure(change: Tensor, hessian: Tensor) -> float:
    """Returns tr(D H D^T)."""
    return float(torch.trace(change @ hessian @ change.T))


def solve(target: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Returns the weights under a mask with the least error, row by row, by a direct solver."""
    best = torch.zeros_like(target)
    for row in range(len(target)):
        kept = mask[row].nonzero().squeeze(1)
        if len(kept):
            right = (target[row] @ hessian)[kept]
            best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], right)
    return best


def iterate_masks(pattern: Pattern) -> Iterator[Tensor]:
    """Yields every legal mask of one group of columns in one band of rows: bool [height, width]."""
    if isinstance(pattern, TransposableNM):
        rows = [_mark(4, kept) for kept in combinations(range(4), pattern.n)]
        tiles = map(torch.stack, product(rows, repeat=4))
        yield from (tile for tile in tiles if bool((tile.sum(0) == pattern.n).all()))
    elif isinstance(pattern, VNM):
        for shared in combinations(range(pattern.m), 4):
            rows = [_mark(pattern.width, kept) for kept in combinations(shared, pattern.n)]
            yield from map(torch.stack, product(rows, repeat=pattern.height))
    else:
        assert isinstance(pattern, NM | SharedNM | BlockNM)
        columns = pattern.width // pattern.m
        for kept in combinations(range(pattern.m), pattern.n):
            yield _mark(pattern.m, kept).repeat_interleave(columns).expand(pattern.height, -1)


def find_best(target: Tensor, hessian: Tensor, pattern: Pattern) -> float:
    """Returns the least error of a matrix of one group of columns, over all legal masks."""
    total = 0.0
    for band in torch.split(target, pattern.height):
        errors = [
            measure(solve(band, hessian, mask) - band, hessian) for mask in iterate_masks(pattern)
        ]
        total += min(errors)
    return total


def _mark(size: int, kept: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return mask
