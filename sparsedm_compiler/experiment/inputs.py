"""The inputs that a configuration names: data, conditions, decoder, and plans for samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ConfigError
from ..data import ImageData, decode_latents, open_autoencoder, open_data
from ..diffusion.condition import Condition, map_condition, read_condition, take_rows
from ..diffusion.guidance import Guidance
from ..diffusion.objective import NoiseScheduler
from ..diffusion.sampling import SamplePlan
from ..diffusion.schedulers import PREDICTIONS, check_steps, make_scheduler
from ..models.schedules import read_schedule
from ..train import SampleGrids
from .run_config import RunConfig


@dataclass(frozen=True, slots=True)
class OpenedInputs:
    """The opened inputs of a run; ``null``: the condition, one row, that stands for none."""

    data: ImageData
    held_out: ImageData | None
    null: Condition | None
    decode: Callable[[Tensor], Tensor] | None

    def make_condition(self, numbers: range) -> Condition | None:
        """Returns the condition of samples by number: classes in turn, or the texts of the data."""
        if self.data.classes is not None:
            return torch.tensor([number % self.data.classes for number in numbers], device="cpu")
        return self.data.fetch([number % len(self.data) for number in numbers])[1]


def open_inputs(config: RunConfig, device: torch.device) -> OpenedInputs:
    """Opens data, null condition and decoder. Raises DataError, ConfigError."""
    spec = config.data
    data = open_data(spec.train, size=spec.size, labels=spec.labels)
    held_out = None
    if spec.held_out is not None:
        limit = spec.held_out_limit
        held_out = open_data(spec.held_out, size=spec.size, labels=spec.labels, limit=limit)
        if held_out.shape != data.shape:
            raise ConfigError(
                f"held-out images are {list(held_out.shape)}, training images "
                f"{list(data.shape)}: set data.size"
            )
    null = None
    if spec.null is not None:
        null = map_condition(lambda part: part[None], read_condition(spec.null))
    decode = None if spec.vae is None else open_decoder(spec.vae, device)
    return OpenedInputs(data, held_out, null, decode)


def open_decoder(folder: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns latents -> images by the AutoencoderKL in ``folder``. Raises ConfigError."""
    vae = open_autoencoder(folder, device)
    return lambda latents: decode_latents(vae, unpack_latents(latents.to(device)))


def unpack_latents(latents: Tensor) -> Tensor:
    """Returns packed latents [n, h * w, 4 C] of square images as [n, C, 2 h, 2 w]; others as is.

    A token of FLUX is a square of 2 x 2 latents, row by row, channels outermost.
    """
    if latents.ndim != 3:
        return latents
    side, channels = math.isqrt(latents.shape[1]), latents.shape[2] // 4
    squares = latents.reshape(-1, side, side, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(-1, channels, 2 * side, 2 * side)


def make_guidance(config: RunConfig, inputs: OpenedInputs) -> Guidance | None:
    """Returns the guidance of samples. Raises ConfigError if nothing stands for no condition."""
    scale, label = config.sample.guidance, config.train.null_label
    if scale is None:
        return None
    if inputs.null is not None:
        return Guidance(scale, take_rows(inputs.null, 0))
    if label is not None:
        return Guidance(scale, label)
    condition = inputs.make_condition(range(1))
    if condition is None or isinstance(condition, Tensor):
        raise ConfigError(f"sample.guidance {scale} needs train.null_label and labelled data")
    return Guidance(scale, map_condition(lambda part: torch.zeros_like(part[0]), condition))


def make_sample_grids(config: RunConfig, inputs: OpenedInputs) -> SampleGrids:
    """Returns the sample grids of a run."""
    spec = config.sample
    return SampleGrids(
        inputs.data.shape,
        count=spec.grid,
        sampler=spec.sampler,
        steps=spec.steps,
        seed=spec.seed,
        condition=inputs.make_condition(range(spec.grid)),
        guidance=make_guidance(config, inputs),
        decode=inputs.decode,
        batch_size=spec.batch_size,
    )


def make_training_scheduler(config: RunConfig) -> NoiseScheduler | None:
    """Returns the scheduler whose noise levels the model was trained with; None is the default.

    Raises ConfigError where the model predicts something else than ``train.objective``.
    """
    schedule, objective = read_schedule(config.model.name), config.train.objective
    if schedule is None:
        return None
    if schedule.objective != objective:
        raise ConfigError(
            f"{schedule.source} says that the model predicts {PREDICTIONS[schedule.objective]!r}, "
            f"train.objective is {objective!r}: set train.objective={schedule.objective}"
        )
    if schedule.betas is None:
        return None
    scheduler: NoiseScheduler = make_scheduler("ddpm", objective, betas=schedule.betas)
    return scheduler


def check_sampling(config: RunConfig) -> None:
    """Raises ConfigError where the model's noise levels do not allow ``sample.steps``."""
    sampler, objective = config.sample.sampler, config.train.objective
    scheduler = make_scheduler(sampler, objective, betas=find_betas(config))
    check_steps(scheduler, config.sample.steps, "sample.steps")


def find_betas(config: RunConfig) -> Mapping[str, Any] | None:
    """Returns the noise levels that the model was trained with, for sampling; None: the default."""
    schedule = read_schedule(config.model.name)
    return None if schedule is None else schedule.betas


def make_sample_plan(config: RunConfig, inputs: OpenedInputs) -> SamplePlan:
    """Returns the plan of the samples that are scored."""
    spec = config.sample
    return SamplePlan(
        (config.score.count, *inputs.data.shape),
        spec.steps,
        spec.seed,
        None if inputs.make_condition(range(1)) is None else inputs.make_condition,
        make_guidance(config, inputs),
        inputs.decode,
        spec.batch_size,
    )
