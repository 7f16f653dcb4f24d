"""``held_out_loss``: the denoising loss on fixed draws, comparable between models and runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..evaluate import evaluating, generator_at, predict
from .batches import Data, one_pass
from .diffusion import ddpm, levels, noised


def held_out_loss(
    model: nn.Module,
    data: Data,
    *,
    scheduler: Any = None,
    draws: int = 4,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """The mean squared error of the predicted noise over ``data``, ``draws`` times.

    Noise and levels depend on ``seed``, the draw and the position in the data alone, and the levels
    of a batch are spread evenly, so the same call compares two models on the same questions.
    ``data`` as in ``finetune``; the model keeps its mode. Raises DataError where there is none.
    """
    scheduler = ddpm() if scheduler is None else scheduler
    count = levels(scheduler)
    place = next(model.parameters())
    total, values = 0.0, 0
    with evaluating(model):
        for draw in range(draws):
            seen = 0
            for images, labels in one_pass(data, batch_size):
                source = generator_at(seed, "held out", draw, seen)
                x = images.to(place.device, torch.float32)
                y = None if labels is None else labels.to(place.device)
                noise = torch.randn(x.shape, generator=source).to(place.device)
                t = spread(len(x), count, source).to(place.device)
                guess = predict(model, noised(scheduler, x, noise, t).to(place.dtype), t, y)
                total += (guess.double() - noise.double()).square().sum().item()
                values += noise.numel()
                seen += len(x)
    if values == 0:
        raise DataError("there are no held-out images")
    return total / values


def spread(size: int, count: int, source: torch.Generator) -> Tensor:
    """``size`` levels below ``count``, one from each of ``size`` equal spans, in random order."""
    within = torch.rand(size, generator=source, dtype=torch.float64)
    spans = torch.randperm(size, generator=source).double()
    return ((spans + within) * (count / size)).long().clamp(max=count - 1)
