"""``mask * weight`` of an N:M pattern in one Triton launch: reads the weight once, writes it once.

Tiles hold about 2048 elements for 4 warps: 16 per thread, and few enough bytes that a
multiprocessor keeps a dozen in flight, which is what a pass bound by memory wants. The places of a
group lie innermost, so that a thread loads neighbours (16 bytes where a group has them) and finds
its group's largest mostly in its own registers. Lanes come in the order of the weight's memory,
whatever its strides, and neighbouring dimensions that are one line of memory are one to the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..patterns import NM, VNM, Pattern, SharedNM
from ..patterns.vnm import SHARED_COLUMNS
from ..selection.top_n import KEYS
from ..triton_support import on_device_of
from ..triton_support import why_unavailable as why_unavailable

_FLOATS = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
_TILE, _LARGEST_TILE = 1 << 11, 1 << 14
_PER_WARP = 1 << 9


class _Dim(NamedTuple):
    """A dimension of lanes: how many, and how far from each other in the weight and the output."""

    size: int
    weight: int
    out: int


def refusal(pattern: Pattern, dtype: torch.dtype) -> str | None:
    """Why no kernel masks such weights, as a sentence; None where one does.

    >>> refusal(Pattern.parse("2:4"), torch.float64)
    'no fused mask for float64'
    """
    if dtype not in _FLOATS:
        return f"no fused mask for {str(dtype).removeprefix('torch.')}"
    if not isinstance(pattern, (NM, SharedNM, VNM)):
        return f"no fused mask for a pattern of the kind of {pattern}"
    if _power(pattern.m) * _power(pattern.height) > _LARGEST_TILE:
        return f"{pattern} masks more than {_LARGEST_TILE} weights together"
    return None


def mask_by_triton(weight: Tensor, pattern: Pattern, *, rest: bool = False) -> Tensor:
    """``kept(weight, unchecked_nm_mask(weight, pattern))``, to the bit, with the same strides.

    ``rest``: ``dropped`` of the same instead, what the mask leaves out.

    ``weight``: [out, in] or [out, in, *kernel] that the pattern fits and ``refusal`` does not name.
    Energies of shared columns are sums in float32: two columns that differ by its rounding alone
    may be ranked as another order of summation would not.
    """
    weight = weight.detach()
    out = torch.empty_like(weight)
    if pattern.is_dense:
        return out.zero_() if rest else out.copy_(weight)
    if weight.numel():
        _launch(weight, out, pattern, rest=rest)
    return out


def _launch(
    weight: Tensor, out: Tensor, pattern: Pattern, *, rest: bool = False, wide: bool = False
) -> None:
    """Fill ``out``. ``wide``: count elements in 64 bits even where 32 do."""
    import triton.language as tl

    from .triton_mask_kernels import mask_kernel

    lanes = weight.numel() // (pattern.m * pattern.height)
    dims = _lanes(weight, out, pattern)
    row = (weight.stride(0), out.stride(0)) if pattern.height > 1 else (0, 0)
    align = math.gcd(16, *row, *(stride for dim in dims for stride in dim[1:]))
    rows, places = _power(pattern.height), _power(pattern.m)
    block = max(1, min(_TILE // (rows * places), _power(lanes)))
    per_row, shared = not isinstance(pattern, SharedNM), 0
    if isinstance(pattern, VNM):
        shared = SHARED_COLUMNS
    elif isinstance(pattern, SharedNM):
        shared = pattern.n
    with on_device_of(weight):
        mask_kernel[(-(-lanes // block),)](
            weight.view(KEYS[weight.dtype]),
            out.view(KEYS[weight.dtype]),
            lanes,
            tuple(dim.size for dim in dims[:-1]),
            tuple(dim.weight // align for dim in dims),
            tuple(dim.out // align for dim in dims),
            *(stride // align for stride in row),
            weight.stride(1),
            out.stride(1),
            N=pattern.n,
            M=pattern.m,
            S=pattern.height,
            SHARED=shared,
            FREE=per_row,
            FLOAT=getattr(tl, _FLOATS[weight.dtype]),
            REST=rest,
            ALIGN=align,
            ROWS=rows,
            LANES=block,
            PLACES=places,
            WIDE=wide or max(_span(weight), _span(out)) + _LARGEST_TILE >= 1 << 31,
            num_warps=min(16, max(1, rows * block * places // _PER_WARP)),
            enable_fp_fusion=False,  # squares are rounded before they are added, as torch does
        )


def _lanes(weight: Tensor, out: Tensor, pattern: Pattern) -> list[_Dim]:
    """The dimensions that lanes run through, the fastest in memory first, as few as can be."""
    units = (pattern.height, pattern.m, *[1] * (weight.dim() - 2))
    dims = sorted(
        (
            _Dim(size // unit, stride * unit, to * unit)
            for size, stride, to, unit in zip(
                weight.shape, weight.stride(), out.stride(), units, strict=True
            )
        ),
        key=lambda dim: dim.weight,
    )
    return _joined(dim for dim in dims if dim.size > 1)


def _joined(dims: Iterable[_Dim]) -> list[_Dim]:
    """One dimension for neighbours that are one line of memory in both; at least one."""
    found: list[_Dim] = []
    for dim in dims:
        last = found[-1] if found else None
        if last and (dim.weight, dim.out) == (last.size * last.weight, last.size * last.out):
            found[-1] = last._replace(size=last.size * dim.size)
        else:
            found.append(dim)
    return found or [_Dim(1, 0, 0)]


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def _power(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << (size - 1).bit_length()
