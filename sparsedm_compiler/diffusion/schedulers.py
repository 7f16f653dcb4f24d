"""Samplers of diffusers by short names, set up for an objective."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import ConfigError
from ..optional_deps import import_diffusers

LEVELS = 1000
SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
"""Our name of a sampler -> the scheduler of diffusers."""
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
"""Our name of an objective -> diffusers' name of its prediction type."""
LINEAR_BETAS = {
    "num_train_timesteps": LEVELS,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
"""The variance-preserving noise schedule of training and sampling (Ho et al. 2020)."""
BETAS = (*LINEAR_BETAS, "trained_betas", "rescale_betas_zero_snr")
"""The settings of a scheduler of diffusers that define its noise levels."""
CLIPPING = ("ddpm", "ddim")
FLOWING = ("euler", "dpm++")


def make_scheduler(
    sampler: str, objective: str, *, clip: bool = False, betas: Mapping[str, Any] | None = None
) -> Any:
    """Returns a scheduler of diffusers for a model trained on a given objective.

    There are 1000 noise levels. Objectives "eps", "v" and "x0" use linear betas from 1e-4 to 0.02
    where ``betas`` does not say otherwise; "flow" is x_s = (1 - s) x_0 + s eps with the target
    eps - x_0 and the time 1000 s.

    Args:
        sampler: "ddpm", "ddim", "dpm++" or "euler". Only the last two can sample from a flow.
        objective: The model's prediction: "eps", "v", "x0" or "flow".
        clip: True clamps every estimate of the clean image to [-1, 1]: right for pixels, wrong for
            latents. Only "ddpm" and "ddim" support it.
        betas: Noise levels that the model was trained with, as ``get_betas`` reads them from
            another scheduler. None is the linear betas; "flow" has none.

    Returns:
        The scheduler, not yet set to a number of steps.

    Raises:
        ConfigError: A name is unknown, the names do not go together, or diffusers is missing.

    Example:
        >>> make_scheduler("ddim", "v").config.prediction_type
        'v_prediction'
    """
    for kind, name, known in (
        ("sampler", sampler, SAMPLERS),
        ("objective", objective, PREDICTIONS),
    ):
        if name not in known:
            raise ConfigError(f"no {kind} is called {name!r}; known: {', '.join(known)}")
    if objective == "flow" and sampler not in FLOWING:
        raise ConfigError(
            f"sampler {sampler!r} does not follow a flow; with objective 'flow' use "
            f"{' or '.join(FLOWING)}"
        )
    if clip and sampler not in CLIPPING:
        raise ConfigError(f"sampler {sampler!r} does not clip; use {' or '.join(CLIPPING)}")
    diffusers = import_diffusers(reason="samplers need diffusers", extra="train")
    cpu = torch.device("cpu")  # whatever the default device is
    if (sampler, objective) == ("euler", "flow"):
        with cpu:
            return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=LEVELS)
    options: dict[str, Any] = {"use_flow_sigmas": True} if objective == "flow" else {}
    if sampler in CLIPPING:
        options["clip_sample"] = clip
    levels = {**LINEAR_BETAS, **({} if betas is None or objective == "flow" else betas)}
    with cpu:
        return getattr(diffusers, SAMPLERS[sampler])(
            **levels, prediction_type=PREDICTIONS[objective], **options
        )


def get_betas(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a scheduler's config that define its noise levels.

    >>> get_betas({"beta_start": 0.00085, "clip_sample": False})
    {'beta_start': 0.00085}
    """
    return {name: config[name] for name in BETAS if name in config}


@runtime_checkable
class ConfiguredScheduler(Protocol):
    """A scheduler that keeps its settings by name, as those of diffusers do."""

    config: Mapping[str, Any]


def check_steps(scheduler: Any, steps: int, option: str = "steps") -> None:
    """Raises ConfigError where there are more steps than the scheduler has noise levels.

    ``option`` is what sets them.
    """
    config = scheduler.config if isinstance(scheduler, ConfiguredScheduler) else {}
    levels = config.get("num_train_timesteps")
    if levels is not None and steps > levels:
        raise ConfigError(
            f"{type(scheduler).__name__} cannot take {steps} steps, as it has {levels} noise "
            f"levels: lower {option}"
        )


def start_scheduler(scheduler: Any, steps: int, device: torch.device) -> Any:
    """Returns a copy of ``scheduler`` set to ``steps`` steps.

    Raises ConfigError where the scheduler allows only fewer steps.
    """
    check_steps(scheduler, steps)
    solver = copy.deepcopy(scheduler)
    if "alphas_cumprod" in vars(solver) and "sigmas" not in vars(solver):
        device = torch.device("cpu")  # it looks each step up in a table there
    try:
        solver.set_timesteps(steps, device=device)
    except ValueError as error:
        raise ConfigError(
            f"{type(scheduler).__name__} cannot take {steps} steps: {error}"
        ) from error
    return solver
