"""What is shown and what is asked, against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from sparsedm_compiler.diffusion.objective import make_objective
from sparsedm_compiler.diffusion.sampling import sample
from sparsedm_compiler.diffusion.schedulers import make_scheduler
from sparsedm_compiler.errors import ConfigError
from sparsedm_compiler.train import FinetuneConfig, finetune, held_out_loss

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[:, None, None, None]
X0 = torch.linspace(-1, 1, 3 * 4).reshape(3, 1, 2, 2)
NOISE = torch.linspace(2, -1, 3 * 4).reshape(3, 1, 2, 2)
U = torch.tensor([0.0, 0.2504, 0.99999], dtype=torch.float64)


@pytest.mark.parametrize("name", ["eps", "v", "x0"])
def test_variance_preserving_targets_equal_their_formulas(name: str) -> None:
    x, t, target = make_objective(name).prepare(X0, NOISE, U)
    assert t.tolist() == [0, 250, 999]
    signal, rest = ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()
    torch.testing.assert_close(x, signal * X0 + rest * NOISE)
    wanted = {"eps": NOISE, "x0": X0, "v": signal * NOISE - rest * X0}[name]
    torch.testing.assert_close(target, wanted)


def test_flow_matching_targets_equal_their_formulas() -> None:
    x, t, target = make_objective("flow").prepare(X0, NOISE, U)
    s = U.float()[:, None, None, None]
    torch.testing.assert_close(x, (1 - s) * X0 + s * NOISE)
    torch.testing.assert_close(t, 1000 * U.float())
    torch.testing.assert_close(target, NOISE - X0)


def test_logit_normal_levels_have_mean_0_and_deviation_1() -> None:
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    _, t, _ = make_objective("flow", levels="logit-normal").prepare(
        torch.zeros(20_000, 1), torch.zeros(20_000, 1), u
    )
    z = torch.logit(t.double() / 1000)
    assert z.mean().item() == pytest.approx(0, abs=1e-3)
    assert z.std().item() == pytest.approx(1, abs=1e-2)


class Ideal(nn.Module):
    """Knows that all images are zero, and says it in the words of an objective."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.name == "flow":
            return x / (t / 1000).clamp_min(1e-3).reshape(-1, 1, 1, 1)
        signal = ABAR[t.long().cpu()].sqrt()
        eps = x / (1 - signal**2).sqrt()
        return {"eps": eps, "v": signal * eps, "x0": torch.zeros_like(x)}[self.name]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # DPM-Solver
@pytest.mark.parametrize("name", ["eps", "v", "x0", "flow"])
def test_a_perfect_model_has_no_loss_and_samples_its_image(name: str) -> None:
    """The ideal model has no loss and draws the image it knows."""
    model = Ideal(name)
    assert held_out_loss(model, torch.zeros(8, 1, 2, 2), objective=name) < 1e-6
    for sampler in ("euler",) if name == "flow" else ("ddim", "dpm++"):
        images = sample(
            model, make_scheduler(sampler, name), shape=(2, 1, 2, 2), steps=20, progress=False
        )
        assert images.abs().max() < 0.05


@pytest.mark.parametrize(
    ("name", "scheduler", "words"),
    [
        ("flow", DDPMScheduler(), "its own noise levels"),
        ("eps", DDIMScheduler(prediction_type="v_prediction"), "'v_prediction', not 'epsilon'"),
    ],
)
def test_a_scheduler_of_another_objective_raises(name: str, scheduler: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_objective(name, scheduler)


def test_logit_normal_levels_without_flow_raise() -> None:
    with pytest.raises(ConfigError, match="for objective 'flow' alone"):
        FinetuneConfig.create(levels="logit-normal")


@pytest.mark.parametrize("name", ["v", "x0", "flow"])
def test_finetuning_on_any_objective_lowers_the_loss(name: str) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.mix(x.flatten(1)).view_as(x)

    model, images = Linear(), 0.3 * torch.ones(64, 1, 2, 2)
    before = held_out_loss(model, images, objective=name)
    options = {"images": 1600, "batch_size": 16, "lr": 3e-2, "objective": name}
    finetune(model, None, images, method="dense", progress=False, **options)
    assert held_out_loss(model, images, objective=name) < 0.8 * before
