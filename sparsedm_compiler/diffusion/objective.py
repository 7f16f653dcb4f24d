"""Training objectives: the noisy input, the time and the target at a drawn noise level.

Variance-preserving, abar_t of a scheduler of diffusers:
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    target: "eps" eps, "x0" x_0, "v" sqrt(abar_t) eps - sqrt(1 - abar_t) x_0   (Salimans & Ho 2022)
Flow matching (Lipman et al. 2023), as SD3 and Flux train:
    x_s = (1 - s) x_0 + s eps,  target eps - x_0,  time input 1000 s
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..errors import ConfigError
from ..optional_deps import import_diffusers
from .schedulers import LEVELS, LINEAR_BETAS, PREDICTIONS

Prepare: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(x_0 [B, ...], noise [B, ...], u [B] in [0, 1)) -> (noisy input, time input [B], target)."""


@runtime_checkable
class NoiseScheduler(Protocol):
    """The part of a diffusers scheduler that training uses."""

    config: Any

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        """Returns ``x_t`` for clean samples, noise and integer levels [B]."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A training objective: its name, and the function that prepares a batch.

    ``prepare(x0, noise, u)`` returns (noisy input, time input, target) for uniform draws u [B] in
    [0, 1).
    """

    name: str
    prepare: Prepare


def make_ddpm_scheduler() -> NoiseScheduler:
    """Returns the default noise schedule: DDPM with 1000 linear betas from 1e-4 to 0.02."""
    diffusers = import_diffusers(reason="the default noise schedule needs diffusers", extra="train")
    with torch.device("cpu"):  # whatever the default device is
        scheduler: NoiseScheduler = diffusers.DDPMScheduler(**LINEAR_BETAS)
    return scheduler


def make_objective(name: str, scheduler: Any = None, levels: str = "uniform") -> Objective:
    """Returns the objective called ``name``: "eps", "v", "x0" or "flow".

    ``scheduler``: of diffusers, for its noise levels; None is ``make_ddpm_scheduler()``. "flow"
    takes none. ``levels``: "uniform" or, for "flow" alone, "logit-normal". Raises ConfigError where
    the scheduler belongs to another objective or does not preserve variance.
    """
    if name == "flow":
        if scheduler is not None:
            raise ConfigError(
                f"objective 'flow' has its own noise levels; leave out {type(scheduler).__name__}"
            )
        return Objective(name, make_flow(levels))
    scheduler = make_ddpm_scheduler() if scheduler is None else scheduler
    prediction = str(check_preserves_variance(scheduler).config.get("prediction_type", "epsilon"))
    if prediction not in ("epsilon", PREDICTIONS[name]):
        title, remedy = type(scheduler).__name__, "set objective to match it"
        raise ConfigError(f"{title} predicts {prediction!r}, not {PREDICTIONS[name]!r}; {remedy}")
    return Objective(name, make_variance_preserving(name, scheduler))


def check_preserves_variance(scheduler: Any) -> NoiseScheduler:
    """Checks that the squares of a scheduler's signal and noise weights add up to 1.

    Returns the scheduler unchanged. Raises ConfigError where they do not, or where it has no
    ``add_noise``.
    """
    name, remedy = type(scheduler).__name__, "pass a DDPM, DDIM or DPM-Solver++ scheduler"
    if not isinstance(scheduler, NoiseScheduler):
        raise ConfigError(
            f"{name} has no add_noise, so it cannot make training noise; {remedy}, or for flow "
            "matching objective='flow' and no scheduler"
        )
    count = int(scheduler.config.num_train_timesteps)
    one, zero, middle = (
        torch.ones(1, 1, device="cpu"),
        torch.zeros(1, 1, device="cpu"),
        torch.tensor([count // 2], device="cpu"),
    )
    signal, noise = (scheduler.add_noise(*pair, middle) for pair in ((one, zero), (zero, one)))
    if not torch.allclose(signal**2 + noise**2, one, atol=1e-3):
        raise ConfigError(f"{name} does not preserve variance (abar + (1 - abar) = 1); {remedy}")
    return scheduler


def make_variance_preserving(name: str, scheduler: NoiseScheduler) -> Prepare:
    """Returns ``prepare`` of "eps", "v" or "x0"; its time input is the integer level [B]."""
    count = int(scheduler.config.num_train_timesteps)

    def prepare(x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = (u * count).long().clamp(max=count - 1)
        x = scheduler.add_noise(x0, noise, t)
        if name == "v":
            return x, t, scheduler.add_noise(noise, -x0, t)
        return x, t, noise if name == "eps" else x0

    return prepare


def make_flow(levels: str) -> Prepare:
    """Returns ``prepare`` of flow matching.

    "logit-normal" levels are sigmoid(N(0, 1)) (Esser et al. 2024).
    """

    def prepare(x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = torch.sigmoid(torch.special.ndtri(u)) if levels == "logit-normal" else u
        s = s.to(x0.dtype)
        wide = s.reshape(-1, *[1] * (x0.dim() - 1))
        return (1 - wide) * x0 + wide * noise, LEVELS * s, noise - x0

    return prepare
