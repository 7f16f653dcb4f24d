"""Packs a weight for the CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError, PackError
from ...patterns import Pattern, SharedNM
from ..weight_matrix import to_matrix
from .build import load_library
from .format import BLOCKS, DEPTH, NARROW, allocate, lie_side_by_side, plan_layout, why_refused


def pack(
    weight: Tensor,
    mask: Tensor,
    pattern: Pattern,
    *,
    width: int | None = None,
    wide: int = NARROW,
) -> Tensor:
    """Returns the packed form (uint8, 1-D) of ``weight * mask``.

    weight, mask: [rows, cols] or [rows, channels, kh, kw]; ``mask`` is one of ``pattern``.
    ``width``: columns of a block. ``wide``: WIDE for bfloat16 and masks shared by a multiple of 16
    rows; BLOCKS if besides all columns are kept or pruned in blocks of a multiple of 32.

    Raises:
        PackError: A weight that cannot be packed, or a mask that is not one of ``pattern``.
        KernelError: No kernel library here.
    """
    weight, mask = to_matrix(weight.detach()), to_matrix(mask)
    rows, cols = weight.shape
    why = why_refused(pattern, rows, cols, weight.dtype)
    if why is not None:
        raise PackError(f"a weight of {list(weight.shape)} cannot be packed to {pattern}: {why}")
    threads = torch.get_num_threads()
    layout = plan_layout(pattern, rows, cols, weight.dtype, width=width, wide=wide, threads=threads)
    packed = allocate(layout)
    mask = mask.to(torch.bool).contiguous()
    if not _keeps_n(mask, pattern):  # the packer trusts it, and would write out of bounds
        raise PackError(f"the mask is not one of {pattern}")
    if wide == BLOCKS and not _keeps_blocks(mask, pattern):
        raise PackError(f"the mask of {pattern} does not keep 32 neighbours each")
    if load_library().sdm_pack(weight.data_ptr(), mask.data_ptr(), packed.data_ptr()) != 0:
        raise KernelError("packing a weight ran out of memory")
    return packed


def _keeps_n(mask: Tensor, pattern: Pattern) -> bool:
    """Returns whether every group keeps exactly n, in the same places where rows share a mask."""
    counts = torch.unflatten(mask, 1, (-1, pattern.m)).sum(2)
    if bool((counts != pattern.n).any()):
        return False
    if not isinstance(pattern, SharedNM):
        return True
    blocks = torch.split(mask, pattern.rows)
    return all(torch.equal(block, block[:1].expand_as(block)) for block in blocks)


def _keeps_blocks(mask: Tensor, pattern: Pattern) -> bool:
    """Returns whether the columns that every group of rows keeps are blocks of 32 neighbours."""
    if not isinstance(pattern, SharedNM) or pattern.n % DEPTH or pattern.m % DEPTH:
        return False
    rows = mask[:: pattern.rows]
    return lie_side_by_side(rows.nonzero()[:, 1].view(len(rows), -1))
