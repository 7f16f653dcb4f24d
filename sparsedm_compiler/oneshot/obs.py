"""OBS of one weight matrix: columns left to right, the error pushed into later columns.

SparseGPT (Frantar & Alistarh 2023) of ``tr((W - W0) H (W - W0)^T)``. It differs in two ways. The
removal of a whole group is chosen at once and exactly where that is possible (removals.py), and the
kept weights of a group adapt too. At the end all kept weights are solved for again under the mask,
by conjugate gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import NestedNM, Pattern
from .removals import is_known, remove_cheapest

BLOCK = 128
"""Columns after which the error is pushed into all later ones."""
REFIT_STEPS = 30
"""Most steps of conjugate gradients."""
REFIT_DONE = 1e-8
"""The share of a row's first squared residual at which its refit is done."""


class IndefiniteError(ArithmeticError):
    """A Hessian that is not positive definite: it needs more damping."""


def prune_matrix(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Prunes a matrix so that it changes its layer's output least.

    Args:
        weight: float64 [rows, d]; groups of the pattern lie along d.
        hessian: float64 [d, d], positive definite: damped already.
        pattern: What to prune to; it fits the shape.

    Returns:
        The pruned matrix, zero where the mask is False. Its error is not above that of the largest
        magnitudes (but for N:M within blocks, which are chosen first).

    Raises:
        IndefiniteError: The Hessian is not positive definite.
    """
    if isinstance(pattern, NestedNM):
        return _prune_nested(weight, hessian, pattern)
    factor = factorize_inverse(hessian)
    if is_known(pattern):
        pruned, mask = _sweep(weight.clone(), factor, pattern)
    else:
        scores = weight / factor.square().sum(0).sqrt()  # w^2 / [H^-1]_jj, as magnitudes
        mask = pattern.compute_mask(scores)
        pruned = weight * mask
    pruned = refit(pruned, weight, hessian, mask)
    largest = pattern.compute_mask(weight)
    plain = weight * largest
    if measure_error(pruned - weight, hessian) <= measure_error(plain - weight, hessian):
        return pruned
    return refit(plain, weight, hessian, largest)  # group after group is no search of all masks


def measure_error(change: Tensor, hessian: Tensor) -> float:
    """Returns ``tr(D H D^T)`` of a change D [rows, d] of a matrix."""
    return float(((change @ hessian) * change).sum())


def factorize_inverse(hessian: Tensor) -> Tensor:
    """Returns the upper triangular U with ``U^T U = H^-1``.

    Its lower right parts are the same for the Hessians of the last columns alone.

    Raises:
        IndefiniteError: H is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info):
        raise IndefiniteError
    one = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    upper = lower.flip(0, 1)  # H = R R^T with R upper triangular
    inverse: Tensor = torch.linalg.solve_triangular(upper, one, upper=True)
    return inverse


def _sweep(work: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prunes group after group, in place; returns the matrix and its mask."""
    width, columns = pattern.width, work.shape[1]
    mask = torch.ones_like(work, dtype=torch.bool)
    step = max(width, BLOCK // width * width)
    for first in range(0, columns, step):
        last = min(first + step, columns)
        errors = torch.zeros(len(work), last - first, dtype=work.dtype, device=work.device)
        for start in range(first, last, width):
            group = slice(start, start + width)
            own = factor[group, group]
            removal = remove_cheapest(pattern, work[:, group], own.T @ own)
            error = removal.pull @ own.T
            work[:, start:last] -= error @ factor[group, start:last]
            work[:, group].masked_fill_(removal.pruned, 0)
            mask[:, group] = ~removal.pruned
            errors[:, start - first : start - first + width] = error
        work[:, last:] -= errors @ factor[first:last, last:]
    return work, mask


def refit(weight: Tensor, target: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Minimizes ``tr((W - W0) H (W - W0)^T)`` over the kept weights, by conjugate gradients.

    Args:
        weight: The first guess W [rows, d], zero where the mask is False.
        target: W0 [rows, d].
        hessian: H [d, d].
        mask: bool [rows, d], True where weights are kept.

    Returns:
        A matrix whose error is not above that of ``weight``.
    """
    scale = hessian.diagonal().clamp(min=torch.finfo(hessian.dtype).tiny)
    work = weight.clone()
    residual = ((target - work) @ hessian).mul_(mask)
    ready = residual / scale
    direction = ready.clone()
    size = (residual * ready).sum(1, keepdim=True)
    enough = size * REFIT_DONE
    for _ in range(REFIT_STEPS):
        curved = (direction @ hessian).mul_(mask)
        slope = (direction * curved).sum(1, keepdim=True)
        step = torch.where(slope > 0, size / slope, 0.0)
        work.addcmul_(step, direction)
        residual.addcmul_(step, curved, value=-1)
        ready = residual / scale
        before, size = size, (residual * ready).sum(1, keepdim=True)
        if not bool((size > enough).any()):
            break
        direction = ready.addcmul_(torch.where(before > 0, size / before, 0.0), direction)
    return work


def _prune_nested(weight: Tensor, hessian: Tensor, pattern: NestedNM) -> Tensor:
    """Removes blocks first, and then prunes within the kept columns of every band of rows.

    There the band's loss is, up to a constant, ``tr((W - K) H_II (W - K)^T)``, with I the kept
    columns and K the solution for the blocks alone.
    """
    blocks = weight if pattern.block.is_dense else prune_matrix(weight, hessian, pattern.block)
    pruned = torch.zeros_like(weight)
    for kept, band in zip(
        torch.split(blocks, pattern.rows), torch.split(pruned, pattern.rows), strict=True
    ):
        inside = torch.unflatten(kept.ne(0).any(0), 0, (-1, pattern.columns)).any(1)
        columns = inside.repeat_interleave(pattern.columns).nonzero().squeeze(1)
        if len(columns):
            within = hessian[columns][:, columns]
            band[:, columns] = prune_matrix(kept[:, columns], within, pattern.inner)
    return pruned
