"""Weights, packed, beside their masked dense form, and bounds on what rounding may do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler import Pattern
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.backends.cpu.format import NARROW
from sparsedm_compiler.backends.cpu.norm_conv import nm_norm_conv2d_op
from sparsedm_compiler.backends.cpu.ops import nm_conv2d_op, nm_linear_op
from sparsedm_compiler.backends.cpu.pack import pack
from sparsedm_compiler.masks.nm_mask import nm_mask

PATTERNS = (
    *("2:4", "1:4", "1:8", "3:4", "1:16", "31:32", "2:6", "1:2"),
    *("2:4t", "1:8x16", "2:4x4", "2:4x5", "1:4x6", "1:2x3", "1:4x2", "16:2:8"),
    *("1:2@8x4", "1:4@16x8", "3:4@3x5", "1:2@1x6", "1:2@8x8+2:4", "1:2@5x6+1:3"),
)
ACTS = ("none", "gelu", "gelu_tanh", "silu")
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.bfloat16: (2.0**-8, 1e-30), torch.float16: (2.0**-11, 2.0**-25)}
"""What a result may be off by, once rounded: a part of itself, and where it is all but zero."""


@dataclass(frozen=True)
class Case:
    """``masked``: the dense weight that ``packed`` stands for."""

    pattern: Pattern
    masked: Tensor
    packed: Tensor


def case(
    text: str,
    groups: int,
    rows: int,
    dtype: torch.dtype,
    kernel: tuple[int, ...] = (),
    width: int | None = None,
    *,
    wide: int = NARROW,
) -> Case:
    """A random weight of ``groups`` groups of channels; rows are rounded up to whole masks."""
    pattern = Pattern.parse(text)
    rows = -(-rows // pattern.height) * pattern.height
    weight = torch.randn(rows, groups * pattern.width, *kernel).to(dtype)
    mask = nm_mask(weight, pattern)
    accepted = CpuFamily().require_accepted(pattern)
    packed = pack(weight * mask, mask, accepted, width=width, wide=wide)
    return Case(pattern, weight * mask, packed)


def activated(x: Tensor, act: str) -> Tensor:
    if act == "none":
        return x
    return F.silu(x) if act == "silu" else F.gelu(x, approximate=act[4:].strip("_") or "none")


def assert_rounded(
    out: Tensor, exact: Tensor, sums: Tensor, kept: int, act: str, *, cut: bool = False
) -> None:
    """``out`` is ``act(exact)`` but for rounding. exact, sums: float64; sums: |W| |x| + |b|.

    A sum of k products is off by at most (k + 2) u sums, u = 2^-24; an activation (slope at most
    1.13) by a further 4e-7 (1 + |x|); bfloat16 rounds the result once more, by 2^-8 of it, float16
    by 2^-11. ``cut``: it cuts the bits off instead.
    """
    value = activated(exact, act)
    bound = 1.13 * (kept + 2) * 2.0**-24 * sums + 1e-30
    if act != "none":
        bound = bound + 4e-7 * (1 + exact.abs())
    if out.dtype in ROUNDING:
        part, least = ROUNDING[out.dtype]
        bound = bound + (1 + cut) * (part * value.abs() + least)
    assert out.shape == exact.shape
    excess = (out.double() - value).abs() - bound
    assert not excess.numel() or bool((excess <= 0).all()), float(excess.max())


def bias_of(rows: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else torch.randn(rows).to(dtype)


def check_linear(held: Case, x: Tensor, bias: Tensor | None, act: str, tile: int) -> None:
    rows, cols = held.masked.shape
    out = nm_linear_op(x, held.packed, bias, rows, act, tile)
    assert out.dtype == x.dtype
    b = None if bias is None else bias.double()
    exact = F.linear(x.double(), held.masked.double(), b)
    sums = F.linear(x.double().abs(), held.masked.double().abs(), None if b is None else b.abs())
    assert_rounded(out, exact, sums, int(cols * held.pattern.density), act)


def convolve(
    held: Case, x: Tensor, bias: Tensor | None, *sizes: list[int]
) -> tuple[Tensor, Tensor, int]:
    """Returns W * x + b in float64, |W| * |x| + |b|, and the values kept in a row of W."""
    b, weight = None if bias is None else bias.double(), held.masked.double()
    exact = F.conv2d(x, weight, b, *sizes)
    sums = F.conv2d(x.abs(), weight.abs(), None if b is None else b.abs(), *sizes)
    return exact, sums, int(weight[0].numel() * held.pattern.density)


def check_conv(
    held: Case,
    x: Tensor,
    bias: Tensor | None,
    geometry: tuple[tuple[int, int], ...],
    act: str,
    tile: int,
) -> None:
    rows, _, *kernel = held.masked.shape
    stride, padding, dilation = map(list, geometry)
    arguments = (rows, kernel, stride, padding, dilation, act, tile)
    out = nm_conv2d_op(x, held.packed, bias, *arguments)
    exact, sums, kept = convolve(held, x.double(), bias, stride, padding, dilation)
    assert_rounded(out, exact, sums, kept, act)
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        assert out.is_contiguous(memory_format=torch.channels_last)


patterns = st.sampled_from(PATTERNS)
dtypes = st.sampled_from(DTYPES)
acts = st.sampled_from(ACTS)
tiles = st.integers(1, 12)
biases = st.sampled_from((None, *DTYPES))
seeds = st.integers(0, 2**31)


@dataclass(frozen=True)
class Norm:
    """What lies in front of a conv: ``act(group_norm(x + offset))``; None for what is left out."""

    groups: int
    offset: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    act: str = "silu"
    epsilon: float = 1e-5

    def compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result in float64, and what its float32 computation may be off by."""
        moved = x.double() if self.offset is None else x.double() + self.offset.double()
        weight, bias = (None if v is None else v.double() for v in (self.weight, self.bias))
        normal = F.group_norm(moved, self.groups, weight, bias, self.epsilon)
        grouped = moved.reshape(len(x), self.groups, -1)
        scale = (grouped.var(-1, unbiased=False) + self.epsilon).rsqrt()
        size = (scale * grouped.abs().amax(-1)).repeat_interleave(x.shape[1] // self.groups, 1)
        size = size * (1 if weight is None else weight.abs())
        size = size + (1 if bias is None else 1 + bias.abs())
        off = 3e-6 * (size[..., None, None] + normal.abs())
        return activated(normal, self.act), off


def check_norm_conv(
    held: Case,
    x: Tensor,
    norm: Norm,
    bias: Tensor | None,
    geometry: tuple[tuple[int, int], ...],
    act: str,
    tile: int,
) -> None:
    rows, _, *kernel = held.masked.shape
    sizes = [*map(list, geometry)]
    before = norm.offset, norm.weight, norm.bias, norm.groups, norm.epsilon, norm.act
    out = nm_norm_conv2d_op(x, held.packed, bias, rows, *before, kernel, *sizes, act, tile)
    assert out.is_contiguous()
    assert out.dtype == x.dtype
    z, off = norm.compute(x)
    exact, sums, kept = convolve(held, z, bias, *sizes)
    moved = F.conv2d(off, held.masked.double().abs(), None, *sizes)
    assert_rounded(out, exact, sums + moved / ((kept + 2) * 2.0**-24), kept, act)
