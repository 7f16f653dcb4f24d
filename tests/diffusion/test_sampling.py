"""Samples against a hand-written sampler, and their independence of everything but the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor, nn

from sparsedm_compiler.diffusion import (
    Guidance,
    SamplePlan,
    generator_at,
    make_scheduler,
    sample,
    sample_batches,
    sampler_name,
)
from sparsedm_compiler.errors import ConfigError, DataError

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


def test_ddim_samples_equal_a_hand_written_sampler() -> None:
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


def test_sampling_restores_model_scheduler_and_random_state() -> None:
    model, scheduler = Halves(), DDPMScheduler()
    model.eval()
    model.dropout.train()
    state = torch.get_rng_state()
    sample(model, scheduler, shape=SHAPE, steps=3, progress=False)
    assert (model.training, model.dropout.training) == (False, True)
    assert scheduler.num_inference_steps is None
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_with_too_few_labels_raises() -> None:
    with pytest.raises(DataError, match="3 labels for 5 images"):
        drawn(labels=torch.arange(3))


def test_sample_with_labels_and_a_condition_raises() -> None:
    with pytest.raises(ConfigError, match="both labels and a condition"):
        drawn(labels=torch.arange(5), condition=torch.arange(5))


def plan(**options: Any) -> SamplePlan:
    return SamplePlan(**{"shape": (11, 1, 2, 2), "steps": 3, "batch_size": 2, "seed": 5, **options})


def batched(scheduler: Any, given: SamplePlan, **options: Any) -> dict[range, Tensor]:
    return dict(sample_batches(Halves(), scheduler, given, progress=False, **options))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMScheduler()], ids=["ddpm", "ddim"])
def test_any_number_of_processes_makes_the_same_images_bit_for_bit(scheduler: Any) -> None:
    alone = batched(scheduler, plan(condition=torch.arange(11)))
    assert [*alone] == [range(n, min(n + 2, 11)) for n in range(0, 11, 2)]
    for processes in (2, 3):
        shares = [
            batched(scheduler, plan(condition=torch.arange(11)), share=(rank, processes))
            for rank in range(processes)
        ]
        assert next(iter(shares[1])) == range(2, 4)
        assert sum(map(len, shares)) == len(alone)
        together = {numbers: images for share in shares for numbers, images in share.items()}
        assert all(torch.equal(together[numbers], alone[numbers]) for numbers in alone)
    whole = drawn(
        scheduler, shape=(11, 1, 2, 2), steps=3, batch_size=2, seed=5, labels=torch.arange(11)
    )
    assert torch.equal(torch.cat([*alone.values()]), whole)


def test_sample_batches_leaves_out_skipped_chunks() -> None:
    everything = batched(DDIMScheduler(), plan())
    some = batched(DDIMScheduler(), plan(), skip=lambda numbers: numbers.start < 6)
    assert [*some] == [range(6, 8), range(8, 10), range(10, 11)]
    assert all(torch.equal(images, everything[numbers]) for numbers, images in some.items())


def test_between_two_chunks_the_model_is_in_its_own_mode() -> None:
    model = Halves().train()
    for _ in sample_batches(model, DDIMScheduler(), plan(), progress=False):
        assert model.training
        assert model.dropout.training
        assert torch.is_grad_enabled()


def test_a_condition_function_is_called_with_image_numbers() -> None:
    asked = []

    def fetch(numbers: range) -> Tensor:
        asked.append(numbers)
        return torch.tensor([*numbers])

    found = drawn(condition=fetch, batch_size=2)
    assert asked == [range(2), range(2, 4), range(4, 5)]
    assert torch.equal(found, drawn(labels=torch.arange(5), batch_size=2))
    assert torch.equal(drawn(condition=lambda numbers: None), drawn())
    with pytest.raises(DataError, match=r"\[1\] has no row for each of 5"):
        drawn(condition=lambda numbers: torch.zeros(1))


def test_samples_with_guidance_equal_guided_labels() -> None:
    y = torch.arange(5)
    by_hand = drawn(DDIMScheduler(clip_sample=False), labels=3 * y - 2 * 4)  # Halves adds its class
    found = drawn(DDIMScheduler(clip_sample=False), labels=y, guidance=Guidance(3.0, null=4))
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"guidance 3.0 needs labels"):
        drawn(guidance=Guidance(3.0, null=4))


def test_sample_decodes_latents() -> None:
    latents = drawn()
    images = drawn(decode=lambda x: x.repeat(1, 3, 2, 2).double())
    assert images.dtype == torch.float32
    assert torch.equal(images, latents.repeat(1, 3, 2, 2))
    for wrong in (lambda x: x[:1], lambda x: x.flatten(1), lambda x: (x,)):
        with pytest.raises(DataError, match="decode made"):
            drawn(decode=wrong)


def test_sample_with_options_out_of_range_raises() -> None:
    for shape in ((0, 1, 2, 2), (), (3, 0)):
        with pytest.raises(ConfigError, match="shape"):
            drawn(shape=shape)
    for name in ("steps", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} 0 is not >= 1"):
            drawn(**{name: 0})
        with pytest.raises(ConfigError, match=f"{name} 2.5 is not a whole number"):
            drawn(**{name: 2.5})
    with pytest.raises(ConfigError, match=r"seed 1\.5 is not a whole number"):
        drawn(seed=1.5)
    for scheduler in (DDIMScheduler(), DPMSolverMultistepScheduler()):
        with pytest.raises(ConfigError, match="cannot take 2000 steps, as it has 1000 noise lev"):
            drawn(scheduler, steps=2000)
    with pytest.raises(DataError, match=r"'y' \[3\] has no row for each of 5"):
        drawn(condition={"y": torch.zeros(3)})
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="does not exist"):
            batched(DDIMScheduler(), plan(), share=share)


def test_sampler_name_contains_steps_and_guidance() -> None:
    assert sampler_name(DDIMScheduler(), 50) == "DDIMScheduler 50 steps"
    guidance = Guidance(1.5, null=10)
    assert sampler_name(DDIMScheduler(), 50, guidance) == "DDIMScheduler 50 steps, guidance 1.5"


def test_progress_bar_counts_the_steps_of_the_share(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in sample_batches(Halves(), DDIMScheduler(), plan(), share=(0, 2)):
        pass
    assert "sample DDIMScheduler 3 steps: 100%" in (text := capfd.readouterr().err)
    assert "9/9" in text


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Euler
@pytest.mark.parametrize(
    ("name", "objective"), [("euler", "eps"), ("euler", "flow"), ("ddim", "v")]
)
def test_the_first_model_input_is_the_noise_of_the_seed(name: str, objective: str) -> None:
    seen: list[Tensor] = []

    class Sees(Halves):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            seen.append(x)
            return x

    sample(Sees(), make_scheduler(name, objective), shape=SHAPE, steps=3, seed=9, progress=False)
    noise = [torch.randn(1, 2, 2, generator=generator_at(9, "sample", i)) for i in range(5)]
    torch.testing.assert_close(seen[0], torch.stack(noise), rtol=1e-3, atol=1e-4)
