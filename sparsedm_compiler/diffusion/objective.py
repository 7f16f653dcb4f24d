"""``Objective``: what the models are shown and what they must predict, at a noise level.

Variance-preserving, abar_t of a scheduler of diffusers:
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    target: "eps" eps, "x0" x_0, "v" sqrt(abar_t) eps - sqrt(1 - abar_t) x_0   (Salimans & Ho 2022)
Flow matching (Lipman et al. 2023), as SD3 and Flux train:
    x_s = (1 - s) x_0 + s eps,  target eps - x_0,  time input 1000 s
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import ConfigError
from ..optional_deps import import_diffusers

KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
"""What diffusers calls each variance-preserving objective."""

FLOW_SCALE = 1000.0


@runtime_checkable
class NoiseScheduler(Protocol):
    """What training asks of a scheduler of diffusers."""

    config: Any

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        """``x_t`` for clean samples, noise and integer levels [B]."""


@dataclass(frozen=True, slots=True)
class Objective:
    """``ask(x0, noise, u)`` gives (x_t, time input, target) for uniform draws u [B] in [0, 1)."""

    name: str
    ask: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def ddpm() -> NoiseScheduler:
    """The default noise schedule: DDPM with 1000 linear betas from 1e-4 to 0.02."""
    found: NoiseScheduler = import_diffusers().DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    return found


def objective_of(name: str, scheduler: Any = None, levels: str = "uniform") -> Objective:
    """The objective of that name. Raises ConfigError where the scheduler is for another one.

    ``scheduler``: of diffusers, its noise levels; None is ``ddpm`` (flow matching takes none).
    """
    if name == "flow":
        if scheduler is not None:
            raise ConfigError(
                f"objective 'flow' has its own noise levels; leave out {type(scheduler).__name__}"
            )
        return Objective(name, flow(levels))
    scheduler = ddpm() if scheduler is None else scheduler
    kind = str(checked(scheduler).config.get("prediction_type", "epsilon"))
    if kind not in ("epsilon", KINDS[name]):
        title, way = type(scheduler).__name__, "set objective to match it"
        raise ConfigError(f"{title} predicts {kind!r}, not {KINDS[name]!r}; {way}")
    return Objective(name, preserving(name, scheduler))


def checked(scheduler: Any) -> NoiseScheduler:
    """``scheduler`` if it preserves variance. Raises ConfigError."""
    name, way = type(scheduler).__name__, "pass a DDPM, DDIM or DPM-Solver++ scheduler"
    if not isinstance(scheduler, NoiseScheduler):
        raise ConfigError(
            f"{name} has no add_noise, so it cannot make training noise; {way}, or for flow "
            "matching objective='flow' and no scheduler"
        )
    count = int(scheduler.config.num_train_timesteps)
    one, zero, middle = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([count // 2])
    signal, noise = (scheduler.add_noise(*pair, middle) for pair in ((one, zero), (zero, one)))
    if not torch.allclose(signal**2 + noise**2, one, atol=1e-3):
        raise ConfigError(f"{name} does not preserve variance (abar + (1 - abar) = 1); {way}")
    return scheduler


def preserving(
    name: str, scheduler: NoiseScheduler
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """``ask`` of a variance-preserving objective; its time input is the integer level [B]."""
    count = int(scheduler.config.num_train_timesteps)

    def ask(x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = (u * count).long().clamp(max=count - 1)
        x = scheduler.add_noise(x0, noise, t)
        if name == "v":
            return x, t, scheduler.add_noise(noise, -x0, t)
        return x, t, noise if name == "eps" else x0

    return ask


def flow(levels: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """``ask`` of flow matching; "logit-normal" levels are sigmoid(N(0, 1)) (Esser et al. 2024)."""

    def ask(x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = torch.sigmoid(torch.special.ndtri(u)) if levels == "logit-normal" else u
        s = s.to(x0.dtype)
        wide = s.reshape(-1, *[1] * (x0.dim() - 1))
        return (1 - wide) * x0 + wide * noise, FLOW_SCALE * s, noise - x0

    return ask
