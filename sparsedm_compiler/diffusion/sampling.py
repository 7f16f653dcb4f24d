"""Samples from a diffusion model, drawn with a scheduler of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError, DataError
from ..meta_models import require_values
from ..option_values import check_seed, check_whole
from ..progress import ProgressBar, show_progress_bar, watch_compilation
from .condition import Condition, check_count, check_labels, move, move_condition, take_rows
from .guidance import Guidance, apply_guidance
from .image_batches import CHUNK, NumberedBatches, ProcessShare, iterate_chunks
from .modes import evaluating
from .predict import generator_at
from .schedulers import start_scheduler


@runtime_checkable
class ScalingScheduler(Protocol):
    """A scheduler that scales its first noise and the input of the model."""

    init_noise_sigma: float

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Returns the model's input for ``sample``."""


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """The images to draw and the way to draw them.

    Image i draws all its noise from (``seed``, i), so two models with one seed start from the same
    noise, whatever the batch size, the device and the number of processes.

    Attributes:
        shape: (images, channels, height, width) of the model, i.e. of the latents for a latent
            model.
        steps: Steps of the sampler.
        seed: Seed of the noise.
        condition: A row for every image, or a function from image numbers to the condition of
            these images. None draws without a condition.
        guidance: Classifier-free guidance, which needs a condition; None for none.
        decode: A function from the model's samples [B, ...] to images [B, C, H, W], for latents;
            None leaves the samples as they are.
        batch_size: Images that are drawn at once.

    Raises:
        ConfigError: A size or ``steps`` is no whole number >= 1, the seed is none of
            torch, or there is guidance without a condition.
        DataError: ``condition`` does not have a row for every image.

    Example:
        >>> plan = SamplePlan((10, 3, 32, 32), steps=50, condition=torch.arange(10))
        >>> plan.take_condition(range(4, 6))
        tensor([4, 5])
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
        check_whole("steps", self.steps, least=1)
        check_whole("batch_size", self.batch_size, least=1)
        check_seed("seed", self.seed)
        if self.condition is not None and not callable(self.condition):
            check_count(self.condition, self.shape[0])
        if self.guidance is not None and self.condition is None:
            raise ConfigError(f"guidance {self.guidance.scale} needs labels or a condition")

    def take_condition(self, numbers: range) -> Condition | None:
        """Returns the condition of the images ``numbers``.

        Raises DataError where a function returned another number of rows.
        """
        if self.condition is None:
            return None
        if not callable(self.condition):
            return take_rows(self.condition, numbers)
        condition = self.condition(numbers)
        if condition is not None:
            check_count(condition, len(numbers))
        return condition


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
    """Draws images from a diffusion model.

    Neither the batch size nor the device changes the noise of an image. The model runs in eval
    mode and without gradients; its own mode is restored.

    Args:
        model: The diffusion model, on any device; see ``predict`` for the models it may be.
        scheduler: A scheduler of diffusers (DDPM, DDIM, DPM-Solver++ ...), e.g. of
            ``make_scheduler``. It is copied, not changed.
        shape: (images, channels, height, width) of the model.
        steps: Steps of the sampler.
        seed: Seed of the noise; image i draws from (seed, i).
        labels: Class labels [images], short for a ``condition`` of them.
        condition: A row for every image, or a function from image numbers to their condition.
        guidance: Classifier-free guidance; None for none.
        decode: A function from samples [B, ...] to images [B, C, H, W], for latent models.
        batch_size: Images that are drawn at once.
        progress: Whether a progress bar counts the steps.

    Returns:
        The samples float32 on the CPU, of ``shape`` (or as decoded), not clamped.

    Raises:
        ConfigError: An option is out of range, both ``labels`` and ``condition`` are set, or the
            model is on the meta device.
        DataError: Labels, condition or prediction do not fit the images.

    Example:
        >>> from sparsedm_compiler.diffusion import make_scheduler
        >>> class Half(nn.Module):
        ...     def forward(self, x, t):
        ...         return x / 2
        >>> ddim = make_scheduler("ddim", "eps")
        >>> sample(Half(), ddim, shape=(2, 1, 4, 4), steps=3, progress=False).shape
        torch.Size([2, 1, 4, 4])
    """
    if labels is not None:
        if condition is not None:
            raise ConfigError("both labels and a condition are given; put the labels into it")
        if len(labels) != shape[0]:
            raise DataError(f"{len(labels)} labels for {shape[0]} images; give one label per image")
        condition = labels
    plan = SamplePlan(shape, steps, seed, condition, guidance, decode, batch_size)
    batches = sample_batches(model, scheduler, plan, progress=progress)
    return torch.cat([images for _, images in batches])


def sample_batches(
    model: nn.Module,
    scheduler: Any,
    plan: SamplePlan,
    *,
    share: ProcessShare = (0, 1),
    skip: Callable[[range], bool] | None = None,
    progress: bool = True,
) -> NumberedBatches:
    """Yields the images of a plan chunk by chunk, as ``sample`` draws them.

    Every process draws whole chunks, so any number of processes draws the same images bit for bit.
    Between two chunks the model is in its own mode.

    Args:
        model: The diffusion model, on any device.
        scheduler: A scheduler of diffusers. It is copied, not changed.
        plan: The images to draw.
        share: (rank, processes) of this process; the default draws all chunks.
        skip: Returns True for the numbers of a chunk that is not needed; None draws every chunk.
        progress: Whether a progress bar counts the steps.

    Yields:
        Image numbers, and these images float32 [B, C, H, W] on the CPU.

    Raises:
        ConfigError: The model is on the meta device, the share does not exist, or the scheduler
            cannot take so many steps.
        DataError: Condition, prediction or decoded images do not fit.

    Example:
        >>> from sparsedm_compiler.diffusion import make_scheduler
        >>> class Half(nn.Module):
        ...     def forward(self, x, t):
        ...         return x / 2
        >>> plan = SamplePlan((5, 1, 4, 4), steps=2, batch_size=2)
        >>> ddim = make_scheduler("ddim", "eps")
        >>> [n for n, _ in sample_batches(Half(), ddim, plan, share=(1, 2), progress=False)]
        [range(2, 4)]
    """
    require_values(model, "sampling")
    todo = [
        numbers
        for numbers in iterate_chunks(plan.shape[0], plan.batch_size, share)
        if not (skip and skip(numbers))
    ]
    if isinstance(model, DistributedDataParallel):
        model = model.module  # its own forward waits for processes that have fewer chunks
    if isinstance(plan.condition, Tensor):
        check_labels(model, plan.condition)
    if plan.guidance is not None and isinstance(plan.guidance.null, int):
        check_labels(model, torch.tensor([plan.guidance.null], device="cpu"))
    name = sampler_name(scheduler, plan.steps, plan.guidance)
    total = len(todo) * plan.steps
    with show_progress_bar(total, unit="step", name=f"sample {name}", shown=progress) as bar:
        for numbers in todo:
            with evaluating(model), watch_compilation("compiling the model to sample from"):
                images = denoise(model, scheduler, plan, numbers, bar=bar)
            yield numbers, images


def denoise(
    model: nn.Module, scheduler: Any, plan: SamplePlan, numbers: range, *, bar: ProgressBar
) -> Tensor:
    """Draws the images ``numbers`` from their noise, and decodes them."""
    like = next(
        (p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device="cpu")
    )
    solver = start_scheduler(scheduler, plan.steps, like.device)
    generators = [generator_at(plan.seed, "sample", number) for number in numbers]
    noisy = "generator" in inspect.signature(solver.step).parameters
    extra = {"generator": generators} if noisy else {}
    x = torch.stack(
        [torch.randn(plan.shape[1:], generator=source, device="cpu") for source in generators]
    )
    x = x.to(like.device)
    x = x * solver.init_noise_sigma if isinstance(solver, ScalingScheduler) else x
    y = plan.take_condition(numbers)
    y = None if y is None else move_condition(y, like)
    guidance = None if plan.guidance is None else plan.guidance.move_null(like)
    for t, level in zip(solver.timesteps, move(solver.timesteps, like.device), strict=True):
        scaled = solver.scale_model_input(x, t) if isinstance(solver, ScalingScheduler) else x
        guess = apply_guidance(model, scaled.to(like.dtype), level.expand(len(x)), y, guidance)
        x = solver.step(guess, t, x, **extra, return_dict=False)[0]
        bar.update()
    return decode_samples(x.float(), plan.decode)


def decode_samples(x: Tensor, decode: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Decodes samples [B, ...] to images float32 on the CPU; None decodes nothing.

    Raises DataError where ``decode`` returns anything but images [B, C, H, W].
    """
    if decode is None:
        return x.cpu()
    images = decode(x)
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != len(x):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"decode made {shape} of {list(x.shape)}, not images [{len(x)}, C, H, W]")
    return images.float().cpu()


def sampler_name(scheduler: Any, steps: int, guidance: Guidance | None = None) -> str:
    """Returns the name of a sampler as results show it.

    Args:
        scheduler: A scheduler of diffusers.
        steps: Steps of the sampler.
        guidance: Classifier-free guidance; None for none.

    Returns:
        The scheduler's class, the number of steps and, if any, the guidance scale.

    Example:
        >>> from sparsedm_compiler.diffusion import make_scheduler
        >>> sampler_name(make_scheduler("ddim", "eps"), 50, Guidance(2.0, null=10))
        'DDIMScheduler 50 steps, guidance 2.0'
    """
    name = f"{type(scheduler).__name__} {steps} steps"
    return name if guidance is None else f"{name}, guidance {guidance.scale}"
