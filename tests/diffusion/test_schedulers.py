"""Every sampler with every objective reaches data that it is told exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsedm_compiler.diffusion import make_scheduler, sample
from sparsedm_compiler.errors import ConfigError

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
POINT = 0.7
PAIRS = [(s, o) for s in ("ddpm", "ddim", "dpm++", "euler") for o in ("eps", "v", "x0")]
PAIRS += [("euler", "flow"), ("dpm++", "flow")]


class Knows(nn.Module):
    """The right prediction, by hand, for data that are ``POINT`` everywhere."""

    def __init__(self, objective: str) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        if self.objective == "flow":  # x = (1 - s) POINT + s eps, target eps - POINT
            return (x - POINT) / (t[:, None, None, None] / 1000)
        below = t.long().clamp(max=998)
        noise = ((1 - ABAR) / ABAR).sqrt()  # Euler's levels lie between two of the schedule
        ratio = torch.lerp(noise[below], noise[below + 1], t.double() - below)
        abar = (1 / (1 + ratio**2)).float()[:, None, None, None]
        eps = (x - abar.sqrt() * POINT) / (1 - abar).sqrt()
        if self.objective == "eps":
            return eps
        velocity = abar.sqrt() * eps - (1 - abar).sqrt() * POINT
        return velocity if self.objective == "v" else torch.full_like(x, POINT)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # DPM-Solver
@pytest.mark.parametrize(("sampler", "objective"), PAIRS)
def test_every_sampler_reaches_the_data_of_a_perfect_model(sampler: str, objective: str) -> None:
    scheduler = make_scheduler(sampler, objective)
    assert scheduler.config.num_train_timesteps == 1000
    found = sample(Knows(objective), scheduler, shape=(2, 1, 2, 2), steps=12, progress=False)
    tolerance = 0.02 if (sampler, objective) == ("dpm++", "flow") else 1e-3  # its times are whole
    torch.testing.assert_close(found, torch.full_like(found, POINT), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("sampler", "objective"), [p for p in PAIRS if p[1] != "flow"])
def test_scheduler_levels_equal_those_of_training(sampler: str, objective: str) -> None:
    found = make_scheduler(sampler, objective).alphas_cumprod.double()
    torch.testing.assert_close(found, ABAR, rtol=1e-4, atol=1e-6)


def test_make_scheduler_with_unknown_or_mismatched_names_raises() -> None:
    with pytest.raises(ConfigError, match=r"no sampler is called 'plms'; known: ddpm, ddim, dpm"):
        make_scheduler("plms", "eps")
    with pytest.raises(ConfigError, match=r"no objective is called 'epsilon'; known: eps, v, x0"):
        make_scheduler("ddim", "epsilon")
    for sampler in ("ddpm", "ddim"):
        with pytest.raises(ConfigError, match=r"does not follow a flow; .* euler or dpm\+\+"):
            make_scheduler(sampler, "flow")
    for sampler in ("dpm++", "euler"):
        with pytest.raises(ConfigError, match="does not clip; use ddpm or ddim"):
            make_scheduler(sampler, "eps", clip=True)
    assert [make_scheduler("ddim", "eps", clip=c).config.clip_sample for c in (0, 1)] == [0, 1]
