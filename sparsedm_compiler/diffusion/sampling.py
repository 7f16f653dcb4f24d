"""``sample``: draw images from a diffusion model with a scheduler of diffusers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..errors import ConfigError, DataError
from .condition import Condition, check_count, move_condition, take_rows
from .guidance import Guidance, apply_guidance
from .image_batches import CHUNK, Batches, Share, chunks
from .modes import evaluating
from .predict import generator_at


@runtime_checkable
class Scaling(Protocol):
    """A scheduler that scales its first noise and what the model is shown."""

    init_noise_sigma: float

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """What the model is shown for ``sample``."""


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """What to draw: ``shape`` = (images, channels, height, width) of the model, in ``steps``.

    Image i draws all its noise from (``seed``, i), so two models given one seed start from the same
    noise. ``condition``: a row for each image, or a function from image numbers to the condition
    of these. ``decode``: from what the model makes [B, ...] to images [B, C, H, W], for latents.
    Images are made in chunks of ``batch_size``. Raises ConfigError and DataError.
    """

    shape: tuple[int, ...]
    steps: int
    seed: int = 0
    condition: Condition | Callable[[range], Condition | None] | None = None
    guidance: Guidance | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    batch_size: int = CHUNK

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ConfigError(f"shape {list(self.shape)} is not images x channels x ..., each >= 1")
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{name} {value} is not >= 1")
        if self.condition is not None and not callable(self.condition):
            check_count(self.condition, self.shape[0])
        if self.guidance is not None and self.condition is None:
            raise ConfigError(f"guidance {self.guidance.scale} needs labels or a condition")

    def condition_of(self, numbers: range) -> Condition | None:
        """The condition of these images. Raises DataError where its rows are not as many."""
        if self.condition is None:
            return None
        if not callable(self.condition):
            return take_rows(self.condition, numbers)
        found = self.condition(numbers)
        if found is not None:
            check_count(found, len(numbers))
        return found


def sample(
    model: nn.Module,
    scheduler: Any,
    *,
    shape: tuple[int, ...],
    steps: int,
    seed: int = 0,
    labels: Tensor | None = None,
    condition: Condition | Callable[[range], Condition | None] | None = None,
    guidance: Guidance | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = CHUNK,
    progress: bool = True,
) -> Tensor:
    """Samples ``shape`` = (images, channels, height, width) on the CPU, float32, not clamped.

    ``scheduler``: any of diffusers (DDPM, DDIM, DPM-Solver++ ...); it is copied, not touched.
    ``labels``: class labels [images], short for a condition of them; the rest as in ``SamplePlan``.
    Neither the batch size nor the device changes the noise of an image. The model keeps its mode
    and gets no gradients. Raises DataError where the labels do not fit.
    """
    if labels is not None:
        if condition is not None:
            raise ConfigError("both labels and a condition are given; put the labels into it")
        if len(labels) != shape[0]:
            raise DataError(f"{len(labels)} labels for {shape[0]} images; give one label per image")
        condition = labels
    plan = SamplePlan(shape, steps, seed, condition, guidance, decode, batch_size)
    made = sample_batches(model, scheduler, plan, progress=progress)
    return torch.cat([images for _, images in made])


def sample_batches(
    model: nn.Module,
    scheduler: Any,
    plan: SamplePlan,
    *,
    share: Share = (0, 1),
    skip: Callable[[range], bool] | None = None,
    progress: bool = True,
) -> Batches:
    """The images of ``plan`` chunk by chunk with their numbers, as ``sample`` makes them.

    ``share`` = (rank, processes): every process takes whole chunks, so any number of processes
    makes the same images bit for bit. ``skip``: says of a chunk that it is not needed. Between
    two chunks the model has its own mode.
    """
    todo = [
        part for part in chunks(plan.shape[0], plan.batch_size, share) if not (skip and skip(part))
    ]
    if isinstance(model, DistributedDataParallel):
        model = model.module  # its own forward waits for processes that have fewer chunks
    name = sampler_name(scheduler, plan.steps, plan.guidance)
    total = len(todo) * plan.steps
    with tqdm(total=total, unit="step", disable=not progress, desc=f"sample {name}") as bar:
        for numbers in todo:
            with evaluating(model):
                images = denoise(model, scheduler, plan, numbers, bar=bar)
            yield numbers, images


def denoise(
    model: nn.Module, scheduler: Any, plan: SamplePlan, numbers: range, *, bar: tqdm[Any]
) -> Tensor:
    """The images that the noise of ``numbers`` becomes, decoded."""
    place = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    solver = started(scheduler, plan.steps, place.device)
    sources = [generator_at(plan.seed, "sample", number) for number in numbers]
    noisy = "generator" in inspect.signature(solver.step).parameters
    extra = {"generator": sources} if noisy else {}
    x = torch.stack([torch.randn(plan.shape[1:], generator=source) for source in sources])
    x = x.to(place.device)
    x = x * solver.init_noise_sigma if isinstance(solver, Scaling) else x
    y = plan.condition_of(numbers)
    y = None if y is None else move_condition(y, place)
    for t in solver.timesteps:
        given = solver.scale_model_input(x, t) if isinstance(solver, Scaling) else x
        guess = apply_guidance(model, given.to(place.dtype), t.expand(len(x)), y, plan.guidance)
        x = solver.step(guess, t, x, **extra, return_dict=False)[0]
        bar.update()
    return decoded(x.float(), plan.decode)


def started(scheduler: Any, steps: int, device: torch.device) -> Any:
    """A copy of ``scheduler`` set to ``steps`` steps. Raises ConfigError where it takes fewer."""
    solver = copy.deepcopy(scheduler)
    try:
        solver.set_timesteps(steps, device=device)
    except ValueError as error:
        raise ConfigError(
            f"{type(scheduler).__name__} cannot take {steps} steps: {error}"
        ) from error
    return solver


def decoded(x: Tensor, decode: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The images of the latents ``x`` [B, ...], float32 on the CPU. Raises DataError."""
    if decode is None:
        return x.cpu()
    images = decode(x)
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != len(x):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"decode made {shape} of {list(x.shape)}, not images [{len(x)}, C, H, W]")
    return images.float().cpu()


def sampler_name(scheduler: Any, steps: int, guidance: Guidance | None = None) -> str:
    """The sampler as results name it, e.g. "DDIMScheduler 50 steps, guidance 2.0"."""
    name = f"{type(scheduler).__name__} {steps} steps"
    return name if guidance is None else f"{name}, guidance {guidance.scale}"
