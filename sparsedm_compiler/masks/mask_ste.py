"""The custom op ``sparsedm::mask_ste``: masked forward, straight-through backward.

Why one opaque op per weight (``python benchmarks/mask_ste.py``: a 12-block U-ViT and a small conv
UNet under Inductor, one CPU thread): it leaves the first compile where the dense model has it,
0.8 to 1.2 times, and tensor code that Inductor could fuse takes 1.2 to 1.4 times as long to
compile. What that tensor code saves is a part of the mask's own time, which does not grow with the
batch; it loses as often as it wins at 2:4. One op for all weights at once is no faster to compile
or to run, and its outputs would hide from the graph which weight is masked how.

On CUDA the mask and the product are one Triton kernel, where there is Triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import PatternError
from ..patterns import Pattern
from . import triton_mask as masking
from .nm_mask import apply_inverse_mask, apply_mask, compute_mask


@torch.library.custom_op("sparsedm::mask_ste", mutates_args=())
def _mask_ste(weight: Tensor, pattern: str) -> Tensor:
    fitting = _fitting(weight, pattern)
    if _fused(weight.device.type, weight.dtype, fitting, masking.unavailable):
        return masking.mask_by_triton(weight, fitting)
    return apply_mask(weight, compute_mask(weight, fitting))


@_mask_ste.register_fake
def _fake(weight: Tensor, pattern: str) -> Tensor:
    _fitting(weight, pattern)
    return torch.empty_like(weight)


def _straight_through(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


_mask_ste.register_autograd(_straight_through)

mask_ste_op = torch.ops.sparsedm.mask_ste.default
"""The op as it stands in a graph: ``mask_ste_op(weight, "2:4")``."""


def mask_ste(weight: Tensor, pattern: str | Pattern) -> Tensor:
    """``mask * weight`` whose gradient reaches every weight: dL/dW = dL/d(mask * W).

    Returns a new tensor of the weight's shape, strides and dtype, under autocast too. Raises
    PatternError where ``nm_mask`` does; NaN and Inf are not looked for, they stay or are pruned.

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
    if _fused(weight.device.type, weight.dtype, pattern, masking.unavailable):
        return masking.mask_by_triton(weight, pattern, rest=True)
    return apply_inverse_mask(weight, compute_mask(weight, pattern))


def _fitting(weight: Tensor, text: str) -> Pattern:
    pattern = Pattern.parse(text)
    why = pattern.misfit(weight.shape[0], weight.shape[1])
    if why is not None:
        raise PatternError(
            f"'{pattern}' does not fit a weight of shape {list(weight.shape)}: {why}"
        )
    return pattern


def _fused(
    device: str, dtype: torch.dtype, pattern: Pattern, unavailable: Callable[[], str | None]
) -> bool:
    """Whether one kernel masks such weights; Triton is asked for on CUDA alone."""
    return device == "cuda" and masking.refusal(pattern, dtype) is None and unavailable() is None
