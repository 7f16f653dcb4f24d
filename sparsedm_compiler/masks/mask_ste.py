"""The custom op ``sparsedm::mask_ste``: masked forward, straight-through backward.

Why one opaque op per weight (``python benchmarks/mask_ste.py``: a 12-block U-ViT and a small conv
UNet under Inductor, one CPU thread): it leaves the first compile where the dense model has it,
0.8 to 1.2 times, and tensor code that Inductor could fuse takes 1.2 to 1.4 times as long to
compile. What that tensor code saves is a part of the mask's own time, which does not grow with the
batch; it loses as often as it wins at 2:4. One op for all weights at once is no faster to compile
or to run, and its outputs would hide from the graph which weight has which pattern.

On CUDA the mask and the product are one Triton kernel, where there is Triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import PatternError
from ..patterns import Pattern
from . import triton_mask
from .nm_mask import apply_inverse_mask, apply_mask, compute_mask, require_maskable


@torch.library.custom_op("sparsedm::mask_ste", mutates_args=())
def _mask_ste(weight: Tensor, pattern: str) -> Tensor:
    parsed = _parse_fitting(weight, pattern)
    if _can_fuse(weight.device.type, weight.dtype, parsed, triton_mask.why_unavailable):
        return triton_mask.mask_by_triton(weight, parsed)
    return apply_mask(weight, compute_mask(weight, parsed))


@_mask_ste.register_fake
def _fake(weight: Tensor, pattern: str) -> Tensor:
    _parse_fitting(weight, pattern)
    return torch.empty_like(weight)


def _straight_through(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


_mask_ste.register_autograd(_straight_through)

mask_ste_op = torch.ops.sparsedm.mask_ste.default
"""The op that stands in graphs: ``mask_ste_op(weight, "2:4")``."""


def mask_ste(weight: Tensor, pattern: str | Pattern) -> Tensor:
    """Returns ``mask * weight``, whose gradient reaches every weight: dL/dW = dL/d(mask * W).

    The mask is computed afresh in every call. The gradient is the straight-through estimator of
    Zhou et al. 2021, whose SR-STE adds a decay of the pruned weights.

    Args:
        weight: [out, in] or [out, in, *kernel] in float16, bfloat16, float32 or float64. NaN and
            Inf raise no error: they count as the largest magnitudes.
        pattern: A pattern or its text, e.g. "2:4".

    Returns:
        A new tensor of the weight's shape, strides and dtype, also under autocast; zero where the
        mask is False.

    Raises:
        MaskError: If the weight has another dtype or fewer dimensions.
        PatternError: If ``pattern`` is no pattern, or does not fit the shape.

    Example:
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]], requires_grad=True)
        >>> mask_ste(weight, "2:4").sum().backward()
        >>> weight.grad
        tensor([[1., 1., 1., 1.]])
    """
    masked: Tensor = mask_ste_op(weight, pattern if isinstance(pattern, str) else str(pattern))
    return masked


def zero_kept(weight: Tensor, pattern: Pattern) -> Tensor:
    """Returns ``(1 - mask) * weight``: the pruned weights, and zero where the mask keeps one.

    Args:
        weight: [out, in] or [out, in, *kernel], known to fit ``pattern``; nothing is checked.
        pattern: The pattern of the mask.

    Returns:
        A new tensor of the weight's shape and dtype, without a gradient.

    Example:
        >>> zero_kept(torch.tensor([[3.0, -4.0, 1.0, 3.0]]), Pattern.parse("2:4"))
        tensor([[0., 0., 1., 3.]])
    """
    if _can_fuse(weight.device.type, weight.dtype, pattern, triton_mask.why_unavailable):
        return triton_mask.mask_by_triton(weight, pattern, inverse=True)
    return apply_inverse_mask(weight, compute_mask(weight, pattern))


def _parse_fitting(weight: Tensor, text: str) -> Pattern:
    """Returns the pattern of a text.

    Raises:
        MaskError: If the weight's dtype has no mask.
        PatternError: If the pattern does not fit the weight.
    """
    pattern = Pattern.parse(text)
    require_maskable(weight, "the weight")
    reason = pattern.misfit(weight.shape[0], weight.shape[1])
    if reason is not None:
        raise PatternError(
            f"'{pattern}' does not fit a weight of shape {list(weight.shape)}: {reason}"
        )
    return pattern


def _can_fuse(
    device: str, dtype: torch.dtype, pattern: Pattern, unavailable: Callable[[], str | None]
) -> bool:
    """Returns whether one kernel masks such weights; Triton is looked for on CUDA alone."""
    if device != "cuda" or triton_mask.explain_refusal(pattern, dtype) is not None:
        return False
    return unavailable() is None
