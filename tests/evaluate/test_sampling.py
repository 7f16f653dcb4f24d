"""Samples against a hand-written sampler, and their independence of everything but the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor, nn

from sparsedm_compiler.errors import DataError
from sparsedm_compiler.evaluate import generator_at, sample

SHAPE = (5, 1, 2, 2)
SCHEDULERS = [DDPMScheduler(), DDIMScheduler(), DPMSolverMultistepScheduler(), PNDMScheduler()]


class Halves(nn.Module):
    """Predicts half its input plus its class; dropout shows whether it runs in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert not torch.is_grad_enabled()
        assert t.shape == (len(x),)
        out: Tensor = self.dropout(self.scale * x)
        return out if y is None else out + y[:, None, None, None]


def drawn(scheduler: Any = None, **options: Any) -> Tensor:
    options = {"shape": SHAPE, "steps": 4, "progress": False, **options}
    return sample(Halves(), scheduler or DDIMScheduler(), **options)


def test_ddim_samples_equal_hand_written_ones() -> None:
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    x = torch.stack(
        [torch.randn(1, 2, 2, generator=generator_at(7, "sample", i)) for i in range(5)]
    )
    y = torch.arange(5)
    for t in (750, 500, 250, 0):
        eps = 0.5 * x + y[:, None, None, None]
        clean = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        before = abar[t - 250] if t else torch.tensor(1.0)
        x = before.sqrt() * clean + (1 - before).sqrt() * eps
    solver = DDIMScheduler(clip_sample=False)
    torch.testing.assert_close(drawn(solver, labels=y, seed=7), x, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # DPM-Solver
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda found: type(found).__name__)
def test_a_sample_depends_on_its_seed_and_number_alone(scheduler: Any) -> None:
    together = drawn(scheduler, seed=3)
    torch.testing.assert_close(drawn(scheduler, seed=3, batch_size=2), together)
    torch.testing.assert_close(drawn(scheduler, seed=3, shape=(2, 1, 2, 2)), together[:2])
    assert not torch.allclose(drawn(scheduler, seed=4), together)
    assert not torch.allclose(together[0], together[1])


def test_the_model_and_the_scheduler_stay_as_they_were() -> None:
    model, scheduler = Halves(), DDPMScheduler()
    model.eval()
    model.dropout.train()
    state = torch.get_rng_state()
    sample(model, scheduler, shape=SHAPE, steps=3, progress=False)
    assert (model.training, model.dropout.training) == (False, True)
    assert scheduler.num_inference_steps is None
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_must_be_as_many_as_images() -> None:
    with pytest.raises(DataError, match="3 labels for 5 images"):
        drawn(labels=torch.arange(3))
