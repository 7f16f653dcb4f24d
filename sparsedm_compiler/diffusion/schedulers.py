"""``make_scheduler``: the sampler that results name, for what the model predicts."""

from __future__ import annotations

from typing import Any

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
"""Our name of an objective -> diffusers' name of what the model predicts."""
CLIPPING = ("ddpm", "ddim")
FLOWING = ("euler", "dpm++")


def make_scheduler(sampler: str, objective: str, *, clip: bool = False) -> Any:
    """A scheduler of diffusers that samples with ``sampler`` from a model trained on ``objective``.

    1000 levels; "eps", "v", "x0": linear betas from 1e-4 to 0.02; "flow": x_s = (1 - s) x_0 + s eps
    with the target eps - x_0 and the time 1000 s. ``clip``: keep every guess of the clean image in
    [-1, 1], right for pixels and wrong for latents ("ddpm" and "ddim" alone can). Raises
    ConfigError for names it does not know, and for pairs that do not go together.

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
    diffusers = import_diffusers()
    if (sampler, objective) == ("euler", "flow"):
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=LEVELS)
    options: dict[str, Any] = {"use_flow_sigmas": True} if objective == "flow" else {}
    if sampler in CLIPPING:
        options["clip_sample"] = clip
    return getattr(diffusers, SAMPLERS[sampler])(
        num_train_timesteps=LEVELS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=PREDICTIONS[objective],
        **options,
    )
