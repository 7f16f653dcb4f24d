"""Ops for masks that are not computed anew in every forward, with a straight-through gradient.

``sparsedm::hold_mask`` multiplies a weight by a mask that is an input. ``sparsedm::soft_threshold``
is S-STE's projection (Hu et al. 2024, "S-STE: Continuous pruning function for efficient 2:4 sparse
pre-training"): ``beta S(w)``, where S moves every kept weight of a group towards zero by the
largest pruned magnitude of the group, so that nothing jumps where the mask changes, and beta is
fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PatternError
from ..patterns import NM, Pattern
from .nm_mask import apply_mask, compute_mask


@torch.library.custom_op("sparsedm::hold_mask", mutates_args=())
def _hold_mask(weight: Tensor, mask: Tensor) -> Tensor:
    return apply_mask(weight, mask)


@_hold_mask.register_fake
def _fake_hold(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("sparsedm::soft_threshold", mutates_args=())
def _soft_threshold(weight: Tensor, scale: Tensor, pattern: str) -> Tensor:
    return project_softly(weight, Pattern.parse(pattern)).mul_(scale.to(weight.dtype))


@_soft_threshold.register_fake
def _fake_soft(weight: Tensor, scale: Tensor, pattern: str) -> Tensor:
    return torch.empty_like(weight)


def _pass_through(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


def _pass_through_two(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


_hold_mask.register_autograd(_pass_through)
_soft_threshold.register_autograd(_pass_through_two)

hold_mask_op = torch.ops.sparsedm.hold_mask.default
"""The op that stands in graphs: ``hold_mask_op(weight, mask)``."""
soft_threshold_op = torch.ops.sparsedm.soft_threshold.default
"""The op that stands in graphs: ``soft_threshold_op(weight, scale, "2:4")``."""


def project_softly(weight: Tensor, pattern: Pattern) -> Tensor:
    """Returns S(w) of S-STE: ``sign(w) (|w| - t)`` where the mask keeps w, else 0.

    t is the largest pruned magnitude of the group.

    Args:
        weight: [out, in, *kernel], which the pattern fits.
        pattern: A per-row "n:m".

    Raises:
        PatternError: The pattern is of another kind.

    Example:
        >>> project_softly(torch.tensor([[3.0, -4.0, 1.0, 0.5]]), Pattern.parse("2:4"))
        tensor([[ 2., -3.,  0.,  0.]])
    """
    require_soft(pattern)
    values = weight.detach()
    mask = compute_mask(values, pattern)
    sizes = torch.unflatten(values.abs().masked_fill(mask, 0), 1, (-1, pattern.m))
    limit = sizes.amax(2, keepdim=True).expand(sizes.shape).flatten(1, 2)
    return torch.where(mask, values - values.sign() * limit, 0.0)


def compute_scale(weight: Tensor, pattern: Pattern) -> Tensor:
    """Returns beta [1]: ``<w, S(w)> / <S(w), S(w)>``, with which beta S(w) is nearest to w.

    1 where S(w) is zero.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    values, soft = weight.detach().to(wide), project_softly(weight, pattern).to(wide)
    size = soft.square().sum()
    beta = torch.where(size > 0, (values * soft).sum() / size, 1.0)
    return beta.reshape(1)


def require_soft(pattern: Pattern) -> None:
    """Raises PatternError for a pattern that S-STE's threshold is not defined for."""
    if not isinstance(pattern, NM):
        raise PatternError(
            f"S-STE's soft threshold is for per-row masks such as '2:4', not for '{pattern}'"
        )
