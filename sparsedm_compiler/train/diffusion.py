"""The forward process: what the student is shown, through a scheduler of diffusers."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.optional import import_diffusers


@runtime_checkable
class NoiseScheduler(Protocol):
    """What training asks of a scheduler of diffusers."""

    config: Any

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        """``x_t`` for clean samples, noise and integer levels [B]."""


def ddpm() -> NoiseScheduler:
    """The default noise schedule: DDPM with 1000 linear betas from 1e-4 to 0.02."""
    found: NoiseScheduler = import_diffusers().DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    return found


def levels(scheduler: NoiseScheduler) -> int:
    """The number of noise levels of ``scheduler``; ConfigError if it trains no VP epsilon."""
    name, way = type(scheduler).__name__, "pass a DDPM, DDIM or DPM-Solver++ scheduler"
    if not isinstance(scheduler, NoiseScheduler):
        raise ConfigError(f"{name} has no add_noise, so it cannot make training noise; {way}")
    if (kind := scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
        raise ConfigError(f"{name} predicts {kind!r}, not 'epsilon', the noise; {way}")
    count = int(scheduler.config.num_train_timesteps)
    one, zero, middle = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([count // 2])
    signal, noise = (noised(scheduler, *pair, middle) for pair in ((one, zero), (zero, one)))
    if not torch.allclose(signal**2 + noise**2, one, atol=1e-3):
        raise ConfigError(f"{name} does not preserve variance (abar + (1 - abar) = 1); {way}")
    return count


def noised(scheduler: NoiseScheduler, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` [B, ...] for the levels t [B]."""
    found: Tensor = scheduler.add_noise(images, noise, t)
    return found


def drawn(images: Tensor, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise like ``images`` [B, ...] and uniform levels below ``count`` [B], on their device."""
    noise = torch.randn(images.shape, generator=source)
    t = torch.randint(count, (len(images),), generator=source)
    return noise.to(images.device), t.to(images.device)
