"""N:M masks: which weights of every group are kept.

A weight is [out, in] or [out, in, *kernel]. Groups of m consecutive input channels, for every
output row and kernel position, keep their n weights of largest magnitude; of equal ones the lowest
index wins, so every group keeps exactly n. Transposable masks (n:4t) are chosen tile by tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import MaskError, PatternError
from ..patterns import Pattern
from ..selection.top_n import KEYS


def nm_mask(weight: Tensor, pattern: str | Pattern, *, name: str | None = None) -> Tensor:
    """True where ``weight`` is kept under ``pattern``: a bool tensor of the weight's shape.

    ``weight``: [out, in] or [out, in, *kernel], float16, bfloat16, float32 or float64; a meta or
    fake tensor gives the shape alone. ``name`` is what errors call the weight. Raises PatternError
    if the pattern does not fit the shape, MaskError if the weight holds NaN or Inf.

    >>> nm_mask(torch.tensor([[3.0, -4.0, 1.0, 3.0]]), "2:4")
    tensor([[ True,  True, False, False]])
    """
    pattern = Pattern.parse(pattern)
    what = "the weight" if name is None else f"parameter {name!r}"
    if weight.dtype not in KEYS or weight.dim() < 2:
        raise MaskError(
            f"{what} is {weight.dtype} of shape {list(weight.shape)}; a mask needs "
            "[out, in] or [out, in, *kernel] in float16, bfloat16, float32 or float64"
        )
    if (why := pattern.misfit(weight.shape[0], weight.shape[1])) is not None:
        raise PatternError(
            f"pattern '{pattern}' does not fit {what} of shape {list(weight.shape)}: {why}; "
            "keep it dense or choose another pattern"
        )
    if weight.is_meta or isinstance(weight, FakeTensor):
        return torch.empty_like(weight, dtype=torch.bool)
    _require_finite(weight.detach(), what)
    return compute_mask(weight, pattern)


def compute_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """``nm_mask`` of a weight known to fit; NaN and Inf count as the largest magnitudes."""
    return pattern.compute_mask(weight.detach())


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """``mask * weight``: exactly zero where the mask is False, even for NaN and Inf."""
    return _times(weight, mask.view(torch.int8))


def apply_inverse_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """``(1 - mask) * weight``: exactly zero where the mask is True."""
    return _times(weight, mask.logical_not().view(torch.int8))


def _times(weight: Tensor, bits: Tensor) -> Tensor:
    """Zeros and ones times the weight's bits: 3 to 10 times faster than float * bool on a CPU."""
    out = torch.empty_like(weight, requires_grad=False)
    keys = KEYS[weight.dtype]
    torch.mul(weight.detach().view(keys), bits, out=out.view(keys))
    return out


def _require_finite(weight: Tensor, what: str) -> None:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if math.isfinite(weight.sum(dtype=wide).item()):
        return
    broken = weight.isfinite().logical_not_().nonzero()
    if len(broken):
        raise MaskError(
            f"{what} holds {len(broken)} NaN or Inf of {weight.numel()} weights, the first at "
            f"{broken[0].tolist()}, so its mask would be arbitrary; load finite weights"
        )
