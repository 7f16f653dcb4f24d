"""Weights and patterns for properties of masks, and the mask by brute force."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations, product

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler.patterns import NM, VNM, Pattern, SharedNM, TransposableNM

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNELS = ((), (3,), (1, 1), (2, 3), (2, 1, 2))


Tile = tuple[tuple[int, ...], ...]
"""The columns that each of the 4 rows of a tile keeps."""


def brute(weight: Tensor, pattern: Pattern) -> Tensor:
    """The mask, one group after the other, in plain Python."""
    if isinstance(pattern, TransposableNM):
        return brute_tiles(weight, pattern.n)
    scores = weight.detach().double().abs().movedim(1, -1)
    rows = scores.reshape(len(scores), -1, scores.shape[-1])  # [out, positions, in]
    marks = torch.zeros(rows.shape, dtype=torch.bool)
    for first in range(0, rows.shape[0], pattern.height):
        block = range(first, first + pattern.height)
        for place in range(rows.shape[1]):
            for start in range(0, rows.shape[2], pattern.m):
                group = range(start, start + pattern.m)
                energy = {i: sum(float(rows[row, place, i]) ** 2 for row in block) for i in group}
                shared = largest(energy, 4 if isinstance(pattern, VNM) else pattern.n)
                for row in block:
                    own = {i: float(rows[row, place, i]) for i in shared}
                    chosen = largest(own, pattern.n) if isinstance(pattern, VNM) else shared
                    marks[row, place, chosen] = True
    return marks.reshape(scores.shape).movedim(-1, 1)


def brute_tiles(weight: Tensor, n: int) -> Tensor:
    """The transposable mask, one tile after the other, of magnitudes whose sums are exact."""
    scores = weight.detach().double().abs()
    marks = torch.zeros(weight.shape, dtype=torch.bool)
    starts = (range(0, weight.shape[0], 4), range(0, weight.shape[1], 4))
    for first, start, *at in product(*starts, *map(range, weight.shape[2:])):
        where = (slice(first, first + 4), slice(start, start + 4), *at)
        tile = scores[where].tolist()
        best = max(
            legal_tiles(n), key=lambda kept: sum(tile[r][c] for r in range(4) for c in kept[r])
        )
        for row, columns in enumerate(best):
            for column in columns:
                marks[(first + row, start + column, *at)] = True
    return marks


@cache
def legal_tiles(n: int) -> list[Tile]:
    """All masks with n in each row and column; the first of equal ones is to be taken."""
    rows = list(combinations(range(4), n))
    tiles = [
        tile
        for tile in product(rows, repeat=4)
        if all(sum(column in row for row in tile) == n for column in range(4))
    ]
    return sorted(tiles, key=lambda tile: (sorted(tile[:2]), sorted(tile[2:]), tile))


def largest(scores: dict[int, float], n: int) -> list[int]:
    """The n places of largest score, the lowest place first among equal ones."""
    return sorted(sorted(scores, key=lambda place: (-scores[place], place))[:n])


def contiguous(weight: Tensor) -> Tensor:
    return weight


def channels_last(weight: Tensor) -> Tensor:
    return weight.movedim(1, -1).contiguous().movedim(-1, 1)


def reversed_strides(weight: Tensor) -> Tensor:
    order = list(range(weight.dim()))[::-1]
    return weight.permute(order).contiguous().permute(order)


def every_other(weight: Tensor) -> Tensor:
    return weight.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    contiguous,
    channels_last,
    reversed_strides,
    every_other,
)


@st.composite
def sizes(draw: st.DrawFn, largest: int = 32) -> Pattern:
    """Any 0 < n <= m, free rows."""
    m = draw(st.integers(1, largest))
    return NM(draw(st.integers(1, m)), m)


@st.composite
def weights(draw: st.DrawFn, pattern: Pattern) -> Tensor:
    """Small integers (so half of all groups tie, and every dtype holds them), in any layout."""
    kernel = draw(st.sampled_from(KERNELS))
    blocks, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = (blocks * pattern.height, groups * pattern.m, *kernel)
    top = draw(st.sampled_from([1, 3, 100]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-top, top + 1, shape, generator=generator)
    layout = draw(st.sampled_from(LAYOUTS))
    return layout(values.to(draw(st.sampled_from(DTYPES))))


@st.composite
def free_cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    pattern = draw(sizes())
    return draw(weights(pattern)), pattern


@st.composite
def coarse_cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    rows = draw(st.integers(2, 5))
    if draw(st.booleans()):
        pattern = VNM(draw(st.integers(1, 4)), draw(st.integers(4, 16)), rows)
    else:
        free = draw(sizes(16))
        pattern = SharedNM(free.n, free.m, rows)
    return draw(weights(pattern)), pattern


@st.composite
def tile_cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    pattern = TransposableNM(draw(st.integers(1, 3)), 4)
    return draw(weights(pattern)), pattern
