"""What a configuration names, opened: data, conditions, decoder; and how samples are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ConfigError
from ..data import ImageData, decode_latents, open_autoencoder, open_data
from ..diffusion.condition import Condition, map_condition, read_condition, take_rows
from ..diffusion.guidance import Guidance
from ..diffusion.sampling import SamplePlan
from ..train.sample_grids import Pictures
from .run_config import RunConfig


@dataclass(frozen=True, slots=True)
class Opened:
    """What a configuration names; ``null``: the condition, one row, that stands for none."""

    data: ImageData
    held_out: ImageData | None
    null: Condition | None
    decode: Callable[[Tensor], Tensor] | None

    def condition(self, numbers: range) -> Condition | None:
        """What samples of those numbers are asked for: classes in turn, or the data's texts."""
        if self.data.classes is not None:
            return torch.tensor([number % self.data.classes for number in numbers])
        return self.data.fetch([number % len(self.data) for number in numbers])[1]


def open_all(config: RunConfig, device: torch.device) -> Opened:
    """Data, null condition and decoder. Raises DataError, ConfigError."""
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
    return Opened(data, held_out, null, None if spec.vae is None else decoder(spec.vae, device))


def decoder(folder: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Latents -> images by the AutoencoderKL in ``folder``. Raises ConfigError."""
    vae = open_autoencoder(folder, device)
    return lambda latents: decode_latents(vae, latents.to(device))


def guidance_of(config: RunConfig, opened: Opened) -> Guidance | None:
    """The guidance of samples. Raises ConfigError where nothing stands for no condition."""
    scale, label = config.sample.guidance, config.train.null_label
    if scale is None:
        return None
    if opened.null is not None:
        return Guidance(scale, take_rows(opened.null, 0))
    if label is not None:
        return Guidance(scale, label)
    given = opened.condition(range(1))
    if given is None or isinstance(given, Tensor):
        raise ConfigError(f"sample.guidance {scale} needs train.null_label and labelled data")
    return Guidance(scale, map_condition(lambda part: torch.zeros_like(part[0]), given))


def pictures_of(config: RunConfig, opened: Opened) -> Pictures:
    """The grids of a run."""
    spec = config.sample
    return Pictures(
        opened.data.shape,
        count=spec.grid,
        sampler=spec.sampler,
        steps=spec.steps,
        seed=spec.seed,
        condition=opened.condition(range(spec.grid)),
        guidance=guidance_of(config, opened),
        decode=opened.decode,
    )


def plan_of(config: RunConfig, opened: Opened) -> SamplePlan:
    """The samples that are scored."""
    draw = config.sample
    return SamplePlan(
        (config.score.count, *opened.data.shape),
        draw.steps,
        draw.seed,
        None if opened.condition(range(1)) is None else opened.condition,
        guidance_of(config, opened),
        opened.decode,
        draw.batch_size,
    )
