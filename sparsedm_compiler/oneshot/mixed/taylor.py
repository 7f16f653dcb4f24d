"""Taylor scores: what removing weights does to a model's output, in first order, by gradients.

``f' - f`` is about ``J dW`` with the Jacobian J of the output. For v of independent random signs
``E_v (dW . J^T v)^2 = |J dW|^2``, and without the terms between two weights it is the sum of
``w^2 E[g^2]`` over the removed ones, ``g = J^T v``. So one backward through every call serves all
layers and all candidates. Molchanov et al. 2019, equation 8, has the loss in the place of v . f,
whose gradient is small in a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ...errors import DataError
from ...progress import show_progress_bar
from ..batches import CalibrationBatch
from ..outputs import call_once, require_finite
from ..targets import Candidates


def measure_taylor(
    model: nn.Module, batches: Sequence[CalibrationBatch], candidates: Candidates, progress: bool
) -> dict[str, dict[str, float]]:
    """Returns ``sum of w^2 E[g^2] over what is removed / E|f|^2`` by weight and candidate.

    Every candidate removes what adds least to that sum.

    Raises:
        DataError: The model cannot be called with a batch, its outputs hold NaN or Inf, or no
            gradient of them reaches a weight.
    """
    weights = {name: own[0].weight for name, own in candidates.items() if own}
    sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    size = 0.0
    with show_progress_bar(
        len(batches), unit="batch", name="choose patterns", shown=progress
    ) as bar:
        for number, batch in enumerate(batches):
            gradients, energy = differentiate(model, batch, [*weights.values()], number)
            size += batch.weight * energy
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    sums[name] += batch.weight * gradient.float().square()
            bar.update()
    errors: dict[str, dict[str, float]] = {}
    for name, own in candidates.items():
        errors[name] = {}
        for target in own:
            saliency = target.weight.detach().float().square() * sums[name]
            kept = target.pattern.compute_mask(saliency.sqrt()).to(torch.bool)
            removed = float(saliency.masked_fill(kept, 0).sum(dtype=torch.float64))
            errors[name][str(target.pattern)] = removed / size if size > 0 else removed
    return errors


def differentiate(
    model: nn.Module, batch: CalibrationBatch, weights: Sequence[nn.Parameter], seed: int
) -> tuple[Sequence[Tensor | None], float]:
    """Returns the gradients of ``v . f`` for random signs v, and ``|f|^2``.

    None stands for a weight that the call did not use.
    """
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            outputs = [x.float() for x in call_once(model, batch)]
            require_finite(model, outputs)
            total = torch.stack([(x * v).sum() for x, v in draw_signs(outputs, seed)]).sum()
            if not total.requires_grad:
                raise DataError(
                    f"no gradient of the outputs of {type(model).__name__} reaches a weight, so "
                    "score 'taylor' cannot be measured: take 'output' or 'layer'"
                )
            gradients = torch.autograd.grad(total, [*weights], allow_unused=True)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    energy = math.fsum(float(x.detach().double().square().sum()) for x in outputs)
    return gradients, energy


def draw_signs(tensors: Sequence[Tensor], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every tensor with random signs of its shape, the same for the same seed."""
    source = torch.Generator().manual_seed(seed)
    for x in tensors:
        signs = torch.randint(2, x.shape, generator=source, dtype=x.dtype, device="cpu") * 2 - 1
        yield x, signs.to(x.device)
