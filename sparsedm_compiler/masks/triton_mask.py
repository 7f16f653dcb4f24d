"""``mask * weight`` of an N:M pattern in one Triton launch, which reads the weight only once.

Tiles hold about 2048 elements for 4 warps: 16 per thread, and few enough bytes that a
multiprocessor keeps a dozen in flight, which is what a pass bound by memory wants. The slots of a
group lie innermost, so that a thread loads neighbours (16 bytes where a group has them) and finds
its group's largest mostly in its own registers. Lanes come in the order of the weight's memory,
whatever its strides, and neighbouring dimensions that are one line of memory are one to the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..patterns import NM, VNM, BlockNM, NestedNM, Pattern, SharedNM
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


class _Slots(NamedTuple):
    """How the slots of a lane are split: ``blocks`` of ``parts`` of ``size`` neighbours each."""

    blocks: int
    parts: int
    size: int

    @property
    def padded(self) -> _Slots:
        """The same with each number rounded up to a power of two."""
        return _Slots(*map(_round_to_power, self))


class _Dim(NamedTuple):
    """A dimension of lanes: their number, and their strides in the weight and in the output."""

    size: int
    weight: int
    out: int


def explain_refusal(pattern: Pattern, dtype: torch.dtype) -> str | None:
    """Returns why no kernel masks such weights, as a sentence; None where one does.

    >>> explain_refusal(Pattern.parse("2:4"), torch.float64)
    'no fused mask for float64'
    """
    if dtype not in _FLOATS:
        return f"no fused mask for {str(dtype).removeprefix('torch.')}"
    if not isinstance(pattern, (NM, SharedNM, VNM, BlockNM, NestedNM)):
        return f"no fused mask for a pattern of the kind of {pattern}"
    slots = math.prod(_split_slots(pattern).padded)
    if slots * _round_to_power(pattern.height) > _LARGEST_TILE:
        return f"{pattern} masks more than {_LARGEST_TILE} weights together"
    return None


def mask_by_triton(weight: Tensor, pattern: Pattern, *, inverse: bool = False) -> Tensor:
    """Returns ``apply_mask(weight, compute_mask(weight, pattern))``, to the bit.

    ``inverse``: ``apply_inverse_mask`` of the same instead, the weights that the mask prunes.

    weight: [out, in] or [out, in, *kernel] that the pattern fits and ``explain_refusal`` does not
    refuse; the result has its strides. Energies of shared columns and blocks are sums in float32:
    two that differ by its rounding alone may be ranked as another order of summation would not.
    """
    weight = weight.detach()
    out = torch.empty_like(weight)
    if pattern.is_dense:
        return out.zero_() if inverse else out.copy_(weight)
    if weight.numel():
        _launch(weight, out, pattern, inverse=inverse)
    return out


def _launch(
    weight: Tensor, out: Tensor, pattern: Pattern, *, inverse: bool = False, wide: bool = False
) -> None:
    """Fills ``out``. ``wide``: counts elements in 64 bits even where 32 would do."""
    from .triton_mask_kernels import block_mask_kernel, mask_kernel

    lanes = weight.numel() // (pattern.width * pattern.height)
    dims = _list_lane_dims(weight, out, pattern)
    row = (weight.stride(0), out.stride(0)) if pattern.height > 1 else (0, 0)
    align = math.gcd(16, *row, *(stride for dim in dims for stride in dim[1:]))
    rows, slots = _round_to_power(pattern.height), math.prod(_split_slots(pattern).padded)
    block = max(1, min(_TILE // (rows * slots), _round_to_power(lanes)))
    kernel = block_mask_kernel if isinstance(pattern, (BlockNM, NestedNM)) else mask_kernel
    with on_device_of(weight):
        kernel[(-(-lanes // block),)](
            weight.view(KEYS[weight.dtype]),
            out.view(KEYS[weight.dtype]),
            lanes,
            tuple(dim.size for dim in dims[:-1]),
            tuple(dim.weight // align for dim in dims),
            tuple(dim.out // align for dim in dims),
            *(stride // align for stride in row),
            weight.stride(1),
            out.stride(1),
            **_make_constants(pattern, weight.dtype),
            INVERSE=inverse,
            ALIGN=align,
            ROWS=rows,
            LANES=block,
            WIDE=wide or max(_count_span(weight), _count_span(out)) + _LARGEST_TILE >= 1 << 31,
            num_warps=min(16, max(1, rows * block * slots // _PER_WARP)),
            enable_fp_fusion=False,  # squares are rounded before they are added, as torch does
        )


def _make_constants(pattern: Pattern, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments of a kernel that follow from the pattern and the dtype alone."""
    import triton.language as tl

    constants = {
        "N": pattern.n,
        "M": pattern.m,
        "S": pattern.height,
        "FLOAT": getattr(tl, _FLOATS[dtype]),
    }
    slots = _split_slots(pattern)
    if isinstance(pattern, (BlockNM, NestedNM)):
        kept = pattern.inner.n if isinstance(pattern, NestedNM) else slots.size
        sizes = {"PARTS": slots.parts, "SIZE": slots.size, "INNER_N": kept}
        padded = dict(zip(("BLOCKS", "GROUPS", "SLOTS"), slots.padded, strict=True))
        return {**constants, **sizes, **padded}
    shared = 0
    if isinstance(pattern, VNM):
        shared = SHARED_COLUMNS
    elif isinstance(pattern, SharedNM):
        shared = pattern.n
    choices = {"SHARED": shared, "PER_ROW": not isinstance(pattern, SharedNM)}
    return {**constants, **choices, "SLOTS": math.prod(slots.padded)}


def _split_slots(pattern: Pattern) -> _Slots:
    """Returns the slots of a lane: blocks of groups of the inner pattern, or single weights."""
    if isinstance(pattern, NestedNM):
        return _Slots(pattern.m, pattern.columns // pattern.inner.m, pattern.inner.m)
    if isinstance(pattern, BlockNM):
        return _Slots(pattern.m, 1, pattern.columns)
    return _Slots(pattern.m, 1, 1)


def _list_lane_dims(weight: Tensor, out: Tensor, pattern: Pattern) -> list[_Dim]:
    """Returns as few dimensions of lanes as possible, the fastest in memory first."""
    units = (pattern.height, pattern.width, *[1] * (weight.dim() - 2))
    dims = sorted(
        (
            _Dim(size // unit, stride * unit, out_stride * unit)
            for size, stride, out_stride, unit in zip(
                weight.shape, weight.stride(), out.stride(), units, strict=True
            )
        ),
        key=lambda dim: dim.weight,
    )
    return _join_dims(dim for dim in dims if dim.size > 1)


def _join_dims(dims: Iterable[_Dim]) -> list[_Dim]:
    """Joins neighbours that are one line of memory in both tensors; returns at least one."""
    joined: list[_Dim] = []
    for dim in dims:
        last = joined[-1] if joined else None
        if last and (dim.weight, dim.out) == (last.size * last.weight, last.size * last.out):
            joined[-1] = last._replace(size=last.size * dim.size)
        else:
            joined.append(dim)
    return joined or [_Dim(1, 0, 0)]


def _count_span(tensor: Tensor) -> int:
    """Returns the number of elements of memory from the first to the last of a tensor."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def _round_to_power(size: int) -> int:
    """Returns the least power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()
