"""``sample``: draw images from a noise-predicting model with a scheduler of diffusers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import DataError
from .calling import evaluating, generator_at, predict


def sample(
    model: nn.Module,
    scheduler: Any,
    *,
    shape: tuple[int, ...],
    steps: int,
    seed: int = 0,
    labels: Tensor | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> Tensor:
    """Samples ``shape`` = (images, channels, height, width) on the CPU, float32, not clamped.

    ``scheduler``: any of diffusers (DDPM, DDIM, DPM-Solver++ ...); it is copied, not touched.
    ``labels``: class labels [images]. Image i draws all its noise from (seed, i), so neither the
    batch size nor the device changes it, and two models given one seed start from the same noise.
    The model keeps its mode and gets no gradients. Raises DataError where the labels do not fit.
    """
    if labels is not None and len(labels) != shape[0]:
        raise DataError(f"{len(labels)} labels for {shape[0]} images; give one label per image")
    batches = []
    total = -(-shape[0] // batch_size) * steps
    with evaluating(model), tqdm(total=total, unit="step", disable=not progress) as bar:
        bar.set_description(f"sample {sampler_name(scheduler, steps)}")
        for first in range(0, shape[0], batch_size):
            numbers = range(first, min(first + batch_size, shape[0]))
            sources = [generator_at(seed, "sample", number) for number in numbers]
            x = torch.stack([torch.randn(shape[1:], generator=source) for source in sources])
            y = None if labels is None else labels[numbers.start : numbers.stop]
            batches.append(denoise(model, scheduler, x, y, steps=steps, sources=sources, bar=bar))
    return torch.cat(batches)


def denoise(
    model: nn.Module,
    scheduler: Any,
    x: Tensor,
    y: Tensor | None,
    *,
    steps: int,
    sources: list[torch.Generator],
    bar: tqdm[Any],
) -> Tensor:
    """The images that the noise ``x`` becomes in ``steps`` steps."""
    place = next(model.parameters())
    solver = copy.deepcopy(scheduler)
    solver.set_timesteps(steps, device=place.device)
    noisy = "generator" in inspect.signature(solver.step).parameters
    extra = {"generator": sources} if noisy else {}
    x = x.to(place.device) * solver.init_noise_sigma
    y = None if y is None else y.to(place.device)
    for t in solver.timesteps:
        given = solver.scale_model_input(x, t)
        eps = predict(model, given.to(place.dtype), t.expand(len(x)), y).float()
        x = solver.step(eps, t, x, **extra, return_dict=False)[0]
        bar.update()
    return x.float().cpu()


def sampler_name(scheduler: Any, steps: int) -> str:
    """The sampler as results name it, e.g. "DDIMScheduler 50 steps"."""
    return f"{type(scheduler).__name__} {steps} steps"
