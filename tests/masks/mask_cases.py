"""Weights and patterns for properties of masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler.patterns import (
    NM,
    VNM,
    BlockNM,
    NestedNM,
    Pattern,
    SharedNM,
    TransposableNM,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNELS = ((), (3,), (1, 1), (2, 3), (2, 1, 2))


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
def per_row_patterns(draw: st.DrawFn, largest_m: int = 32) -> Pattern:
    """Any 0 < n <= m, every row with a mask of its own."""
    m = draw(st.integers(1, largest_m))
    return NM(draw(st.integers(1, m)), m)


@st.composite
def weights(draw: st.DrawFn, pattern: Pattern) -> Tensor:
    """Small integers (so half of all groups tie, and every dtype holds them), in any layout."""
    kernel = draw(st.sampled_from(KERNELS))
    blocks, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = (blocks * pattern.height, groups * pattern.width, *kernel)
    top = draw(st.sampled_from([1, 3, 100]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-top, top + 1, shape, generator=generator)
    layout = draw(st.sampled_from(LAYOUTS))
    return layout(values.to(draw(st.sampled_from(DTYPES))))


@st.composite
def per_row_cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    pattern = draw(per_row_patterns())
    return draw(weights(pattern)), pattern


@st.composite
def shared_cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    rows = draw(st.integers(2, 5))
    if draw(st.booleans()):
        pattern = VNM(draw(st.integers(1, 4)), draw(st.integers(4, 16)), rows)
    else:
        per_row = draw(per_row_patterns(16))
        pattern = SharedNM(per_row.n, per_row.m, rows)
    return draw(weights(pattern)), pattern


@st.composite
def block_patterns(draw: st.DrawFn) -> Pattern:
    """n of every m blocks; in half of them each row keeps n:m."""
    m, rows = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    n, inner = draw(st.integers(1, m)), draw(per_row_patterns(6))
    if draw(st.booleans()) or inner.is_dense:
        return BlockNM(n, m, rows, draw(st.integers(2, 9)))
    assert isinstance(inner, NM)
    return NestedNM(n, m, rows, inner.m * draw(st.integers(1, 3)), inner)


@st.composite
def block_cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    pattern = draw(block_patterns())
    return draw(weights(pattern)), pattern


@st.composite
def transposable_cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    pattern = TransposableNM(draw(st.integers(1, 3)), 4)
    return draw(weights(pattern)), pattern
