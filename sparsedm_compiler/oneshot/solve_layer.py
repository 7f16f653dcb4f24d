"""One layer: prunes its matrix by a method, keeps the better of it and of magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns import Pattern
from .layer_matrix import from_matrix, to_matrix
from .obs import IndefiniteError, measure_error, prune_matrix
from .statistics import LayerStatistics

DAMPING, SPARSE_DAMPING = 0.01, 0.1
"""The share of the Hessian's mean diagonal that is added to it: with half kept or more, with less.

At 1:8 on the model of the study, 0.01 breaks OBS (docs/results/one_shot.md).
"""
HARDER = 10.0
"""The factor by which damping rises where the Hessian is not positive definite."""
MOST_DAMPING = 1e3


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """A pruned weight, and how far it moves the output of its layer.

    Attributes:
        weight: The pruned weight, in the dtype of the layer.
        shift: What is to be added to the bias [out], so that the mean output stays; None for none.
        method: The one that was taken: that which was asked for, or "magnitude".
        reason: Why another method was taken, as a sentence; "" where it was not.
        damping: The share of the mean diagonal that was added to the Hessian; 0 for none.
        error: ``E|dW x|^2 / E|W x|^2``, of the deviations from their means where ``shift`` is set.
        magnitude_error: The same of magnitude pruning.
        kept_energy: The share of the sum of squares of the original weight that lies on the mask.
    """

    weight: Tensor
    shift: Tensor | None
    method: str
    reason: str
    damping: float
    error: float | None
    magnitude_error: float | None
    kept_energy: float


def solve_unseen(weight: Tensor, pattern: Pattern, op: str) -> PrunedLayer:
    """Prunes a weight by magnitude, since its inputs cannot be seen.

    Args:
        weight: [out, in, *kernel], which the pattern fits.
        pattern: What to prune to.
        op: The op that hides its inputs.
    """
    pruned = weight.detach() * pattern.compute_mask(weight.detach())
    reason = f"its inputs are hidden inside {op}"
    return PrunedLayer(
        pruned, None, "magnitude", reason, 0.0, None, None, measure_kept(weight, pruned)
    )


def measure_kept(weight: Tensor, pruned: Tensor) -> float:
    """Returns the share of a weight's sum of squares that lies where ``pruned`` is not zero."""
    energy = weight.detach().to(torch.float64).square()
    return float(energy[pruned != 0].sum() / energy.sum().clamp(min=1e-300))


def solve_layer(
    weight: Tensor,
    pattern: Pattern,
    statistics: LayerStatistics,
    *,
    method: str,
    damping: float | None,
    shifted: bool,
) -> PrunedLayer:
    """Prunes one weight.

    Args:
        weight: [out, in, *kernel], which the pattern fits.
        pattern: What to prune to.
        statistics: Of the layer's inputs.
        method: As in OneShotOptions.
        damping: Damping to begin with; None is that of the pattern's density.
        shifted: Whether the layer's bias may take the mean of the output's error.

    Returns:
        The pruned weight, of the method or of magnitudes, whichever has the smaller error.
    """
    original = to_matrix(weight)
    hessians = statistics.compute_hessians(centered=shifted)
    plain = mask_matrix(original, original, weight, pattern)
    best, used, reason, damped = plain, "magnitude", "", 0.0
    errors = {"magnitude": compute_error(plain - original, hessians, statistics.parts)}
    if method == "wanda":
        norms = torch.cat([h.diagonal() for h in statistics.compute_hessians(centered=False)])
        best, used = mask_matrix(original, original * norms.sqrt(), weight, pattern), method
    elif method == "obs":
        start = choose_damping(pattern) if damping is None else damping
        best, damped = prune_damped(original, hessians, statistics.parts, pattern, start)
        used = method
    rounded = to_matrix(from_matrix(best, weight))
    errors[used] = compute_error(rounded - original, hessians, statistics.parts)
    if not errors[used] <= errors["magnitude"]:
        reason = f"{used} has a larger error ({errors[used]:.3g})"
        best, used, rounded = plain, "magnitude", to_matrix(from_matrix(plain, weight))
    whole = compute_error(original, hessians, statistics.parts)
    scale = 1.0 / whole if whole > 0 else 0.0
    return PrunedLayer(
        weight=from_matrix(best, weight),
        shift=(original - rounded) @ statistics.compute_mean() if shifted else None,
        method=used,
        reason=reason,
        damping=damped if used == "obs" else 0.0,
        error=errors[used] * scale,
        magnitude_error=errors["magnitude"] * scale,
        kept_energy=measure_kept(original, best),
    )


def choose_damping(pattern: Pattern) -> float:
    """Returns the damping that OBS begins with at the density of a pattern."""
    return DAMPING if 2 * pattern.density >= 1 else SPARSE_DAMPING


def mask_matrix(matrix: Tensor, scores: Tensor, like: Tensor, pattern: Pattern) -> Tensor:
    """Returns a matrix under the mask of ``scores``, by the pattern of a weight like ``like``."""
    wide = like.to(torch.float64)
    mask = pattern.compute_mask(from_matrix(scores, wide))
    return matrix * to_matrix(mask)


def compute_error(change: Tensor, hessians: list[Tensor], parts: tuple[range, ...]) -> float:
    """Returns ``tr(D H D^T)``, added up over the parts of the columns."""
    pairs = zip(hessians, parts, strict=True)
    return sum(measure_error(change[:, part.start : part.stop], own) for own, part in pairs)


def prune_damped(
    original: Tensor,
    hessians: list[Tensor],
    parts: tuple[range, ...],
    pattern: Pattern,
    damping: float,
) -> tuple[Tensor, float]:
    """Prunes a matrix by OBS, part by part; returns it and the largest damping that was needed."""
    pruned, most = [], damping
    for hessian, part in zip(hessians, parts, strict=True):
        own, share = original[:, part.start : part.stop], damping
        mean = float(hessian.diagonal().mean()) or 1.0
        one = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        while True:
            try:
                pruned.append(prune_matrix(own, hessian + share * mean * one, pattern))
                break
            except IndefiniteError:
                if share > MOST_DAMPING:
                    raise
                share = max(share * HARDER, 1e-6)
        most = max(most, share)
    return torch.cat(pruned, 1), most
