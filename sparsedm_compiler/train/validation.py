"""``held_out_loss``: the denoising loss on fixed draws, comparable between models and runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import evaluating, generator_at, predict
from ..diffusion.condition import move_condition
from ..diffusion.objective import Objective, make_objective
from ..errors import DataError
from .batches import Data, one_pass


def held_out_loss(
    model: nn.Module,
    data: Data,
    *,
    scheduler: Any = None,
    objective: str | Objective = "eps",
    draws: int = 4,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """The mean squared error of the prediction over ``data``, ``draws`` times.

    Noise and levels depend on ``seed``, the draw and the position in the data alone, and the levels
    of a batch are spread evenly, so the same call compares two models on the same questions.
    ``data``, ``scheduler`` and ``objective`` as in ``finetune``; the model keeps its mode. Raises
    DataError where there are no data.
    """
    if isinstance(objective, str):
        objective = make_objective(objective, scheduler)
    place = next(model.parameters())
    total, values = 0.0, 0
    with evaluating(model):
        for draw in range(draws):
            seen = 0
            for images, condition in one_pass(data, batch_size):
                source = generator_at(seed, "held out", draw, seen)
                x0 = images.to(place.device, torch.float32)
                noise = torch.randn(x0.shape, generator=source).to(place.device)
                u = spread(len(x0), source).to(place.device)
                x, t, target = objective.prepare(x0, noise, u)
                y = None if condition is None else move_condition(condition, place)
                guess = predict(model, x.to(place.dtype), t, y)
                total += (guess.double() - target.double()).square().sum().item()
                values += noise.numel()
                seen += len(x0)
    if values == 0:
        raise DataError("there are no held-out images")
    return total / values


def spread(size: int, source: torch.Generator) -> Tensor:
    """``size`` numbers in [0, 1), one from each of ``size`` equal spans, in random order."""
    within = torch.rand(size, generator=source, dtype=torch.float64)
    spans = torch.randperm(size, generator=source).double()
    return (spans + within) / size
