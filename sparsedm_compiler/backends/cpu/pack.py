"""Dense weight and mask -> packed weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError, PackError
from ...patterns import Pattern
from ..weight_matrix import matrix
from .build import library
from .format import empty, plan, refusal


def pack(
    weight: Tensor,
    mask: Tensor,
    pattern: Pattern,
    *,
    width: int | None = None,
    wide: bool = False,
) -> Tensor:
    """The packed form (uint8, 1-D) of ``weight * mask``.

    weight, mask: [rows, cols] or [rows, channels, kh, kw]; ``mask`` is one of ``pattern``.
    ``width``: columns of a block. ``wide``: the layout for bfloat16 and masks shared by a multiple
    of 16 rows. Raises PackError for a weight that cannot be packed, KernelError
    where there is no kernel library.
    """
    weight, mask = matrix(weight.detach()), matrix(mask)
    rows, cols = weight.shape
    why = refusal(pattern, rows, cols, weight.dtype)
    if why is not None:
        raise PackError(f"a weight of {list(weight.shape)} cannot be packed to {pattern}: {why}")
    packed = empty(plan(pattern, rows, cols, weight.dtype, width=width, wide=wide))
    mask = mask.to(torch.bool).contiguous()
    if library().sdm_pack(weight.data_ptr(), mask.data_ptr(), packed.data_ptr()) != 0:
        raise KernelError("packing a weight ran out of memory")
    return packed
