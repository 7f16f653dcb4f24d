"""N:M masks of weights, and weights multiplied by them.

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
    """Returns the mask of a weight under a pattern.

    Args:
        weight: [out, in] or [out, in, *kernel] in float16, bfloat16, float32 or float64. The mask
            is no part of its autograd graph.
        pattern: A pattern or its text, e.g. "2:4".
        name: Name of the parameter, for the messages of errors; None says "the weight".

    Returns:
        A bool tensor of the weight's shape, True where a weight is kept. For a meta or a fake
        tensor it is a tensor of the same sort, without values.

    Raises:
        MaskError: If the weight has another dtype or fewer dimensions, or holds NaN or Inf.
        PatternError: If ``pattern`` is no pattern, or does not fit the shape.

    Example:
        >>> nm_mask(torch.tensor([[3.0, -4.0, 1.0, 3.0]]), "2:4")
        tensor([[ True,  True, False, False]])
    """
    pattern = Pattern.parse(pattern)
    subject = "the weight" if name is None else f"parameter {name!r}"
    require_maskable(weight, subject)
    if (reason := pattern.misfit(weight.shape[0], weight.shape[1])) is not None:
        raise PatternError(
            f"pattern '{pattern}' does not fit {subject} of shape {list(weight.shape)}: {reason}; "
            "keep it dense or choose another pattern"
        )
    if weight.is_meta or isinstance(weight, FakeTensor):
        return torch.empty_like(weight, dtype=torch.bool)
    _require_finite(weight.detach(), subject)
    return compute_mask(weight, pattern)


def require_maskable(weight: Tensor, subject: str) -> None:
    """Raises MaskError if a weight has a dtype or number of dimensions that masks do not know."""
    if weight.dtype not in KEYS or weight.dim() < 2:
        raise MaskError(
            f"{subject} is {weight.dtype} of shape {list(weight.shape)}; a mask needs "
            "[out, in] or [out, in, *kernel] in float16, bfloat16, float32 or float64"
        )


def compute_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Returns ``nm_mask`` without its checks; NaN and Inf count as the largest magnitudes."""
    return pattern.compute_mask(weight.detach())


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """Returns ``mask * weight``: exactly zero where the mask is False, even for NaN and Inf."""
    return _multiply_bits(weight, mask.view(torch.int8))


def apply_inverse_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """Returns ``(1 - mask) * weight``: exactly zero where the mask is True."""
    return _multiply_bits(weight, mask.logical_not().view(torch.int8))


def _multiply_bits(weight: Tensor, bits: Tensor) -> Tensor:
    """Multiplies the weight's bits, read as integers, by zeros and ones.

    This is 3 to 10 times faster than float * bool on a CPU.
    """
    out = torch.empty_like(weight, requires_grad=False)
    keys = KEYS[weight.dtype]
    torch.mul(weight.detach().view(keys), bits, out=out.view(keys))
    return out


def _require_finite(weight: Tensor, subject: str) -> None:
    """Raises MaskError with the first position of NaN or Inf, if there is one."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if math.isfinite(weight.sum(dtype=wide).item()):
        return
    broken = weight.isfinite().logical_not_().nonzero()
    if len(broken):
        raise MaskError(
            f"{subject} holds {len(broken)} NaN or Inf of {weight.numel()} weights, the first at "
            f"{broken[0].tolist()}, so its mask would be arbitrary; load finite weights"
        )
