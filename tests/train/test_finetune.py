"""The loop against hand-written steps, and every refusal at its door."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparsedm_compiler as sdm
from sparsedm_compiler.diffusion import Guidance, generator_at
from sparsedm_compiler.errors import ConfigError, DataError, SparseDMError
from sparsedm_compiler.models import UViT
from sparsedm_compiler.train import (
    FinetuneConfig,
    FinetuneResult,
    SampleGrids,
    finetune,
    held_out_loss,
)

CONFIG = FinetuneConfig(
    images=24, batch_size=8, lr=1e-2, alpha=0.7, beta=0.3, sr_ste_lambda=0.0, schedule="constant"
)
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[:, None, None, None]


class Boxed:
    """As the outputs of diffusers."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


class Denoiser(nn.Module):
    """A linear noise prediction that sees the level and the class."""

    def __init__(self, seed: int = 0, *, kind: str = "tensor", dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.mix = nn.Linear(4, 4)
            self.levels = nn.Embedding(1000, 4)
            self.classes = nn.Embedding(3, 4)
        self.dropout = nn.Dropout(dropout)
        self.kind = kind

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Any:
        hidden = self.mix(x.flatten(1)) + self.levels(t)
        if y is not None:
            hidden = hidden + self.classes(y)
        out = self.dropout(hidden).view_as(x)
        return {"tensor": out, "tuple": (out, 1), "boxed": Boxed(out)}[self.kind]


def images(count: int = 20) -> Tensor:
    return torch.randn(count, 1, 2, 2, generator=generator_at("images"))


def labels(count: int = 20) -> Tensor:
    return torch.arange(count) % 3


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def tuned(student: nn.Module, data: Any = None, **options: Any) -> FinetuneResult:
    data = (images(), labels()) if data is None else data
    teacher = options.pop("teacher", None)
    return finetune(student, teacher, data, config=CONFIG, progress=False, **options)


def drawn(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Noise and levels of images ``first`` on, each from a generator of its own."""
    noise, levels = [], []
    for number in range(first, first + count):
        source = generator_at(0, "image", number)
        levels.append(int(1000 * torch.rand(3, generator=source, dtype=torch.float64)[0]))
        noise.append(torch.randn(1, 2, 2, generator=source))
    return torch.stack(noise), torch.tensor(levels)


def test_finetune_steps_equal_hand_written_steps() -> None:
    student, teacher, (x_all, y_all) = Denoiser(0), Denoiser(1), (images(), labels())
    oracle, before = copy.deepcopy(student), weights(teacher)
    result = tuned(student, teacher=teacher, schedule="cosine")

    order = [torch.randperm(20, generator=generator_at(0, "order", epoch)) for epoch in range(2)]
    optimizer = torch.optim.AdamW(oracle.parameters(), betas=(0.99, 0.999), weight_decay=0.03)
    losses = []
    for step, rows in enumerate(torch.cat(order)[:24].split(8)):
        x0, y = x_all[rows], y_all[rows]
        eps, t = drawn(8 * step, 8)
        x = ABAR[t].sqrt() * x0 + (1 - ABAR[t]).sqrt() * eps
        guess = oracle(x, t, y)
        loss = 0.7 * F.mse_loss(guess, eps) + 0.3 * F.mse_loss(guess, teacher(x, t, y).detach())
        optimizer.param_groups[0]["lr"] = 1e-2 * (0.5 + 0.5 * math.cos(math.pi * step / 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-4)
    assert result.images == 24
    torch.testing.assert_close(weights(student), weights(oracle), rtol=1e-3, atol=1e-5)
    assert torch.equal(weights(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_ema_starts_from_the_first_weights_and_warms_up() -> None:
    student, trail = Denoiser(), []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    optimizer.register_step_post_hook(lambda *_: trail.append(weights(student)))
    expected = weights(student)
    result = tuned(student, optimizer=optimizer, ema_decay=0.2)
    for step, current in enumerate(trail, start=1):
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * current
    assert result.ema is not None
    torch.testing.assert_close(weights(result.ema), expected)
    assert list(result.ema.state_dict()) == list(student.state_dict())


def test_finetune_twice_is_equal_and_another_seed_differs() -> None:
    first, again, other = (Denoiser(dropout=0.5) for _ in range(3))
    losses = tuned(first).losses
    torch.rand(7)  # the generator of the process has no say
    assert tuned(again).losses == losses
    assert torch.equal(weights(first), weights(again))
    assert tuned(other, seed=1).losses != losses


def test_finetune_restores_modes_and_seeds() -> None:
    student, teacher = Denoiser(dropout=0.5).eval(), Denoiser(1, dropout=0.5)
    student.classes.train()
    state = torch.get_rng_state()
    tuned(student, teacher=teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert (student.training, student.classes.training, teacher.training) == (False, True, True)


def test_finetune_runs_the_student_in_train_mode() -> None:
    calm, noisy = Denoiser().eval(), Denoiser(dropout=0.5).eval()
    assert tuned(noisy).losses == tuned(Denoiser(dropout=0.5)).losses != tuned(calm).losses


def test_finetune_runs_the_teacher_in_eval_mode() -> None:
    calm, noisy = Denoiser(1), Denoiser(1, dropout=0.9)
    assert tuned(Denoiser(), teacher=calm).losses == tuned(Denoiser(), teacher=noisy).losses


@pytest.mark.parametrize("kind", ["tuple", "boxed"])
def test_finetune_accepts_the_output_types_of_diffusers(kind: str) -> None:
    plain = tuned(Denoiser(), teacher=Denoiser(1))
    assert tuned(Denoiser(kind=kind), teacher=Denoiser(1, kind=kind)).losses == plain.losses


def test_finetune_accepts_every_kind_of_data() -> None:
    x, y = images(), labels()
    direct = tuned(Denoiser(), (x, y)).losses
    assert tuned(Denoiser(), TensorDataset(x, y)).losses == direct
    assert tuned(Denoiser(), x).losses == tuned(Denoiser(), TensorDataset(x)).losses != direct
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    ended = tuned(Denoiser(), loader, images=21)
    assert (ended.images, len(ended.losses)) == (25, 5)


def test_finetune_lowers_the_held_out_loss_and_reports_it(tmp_path: Path) -> None:
    student, held = Denoiser(), (images(50), labels(50))
    before = held_out_loss(student, held)
    result = tuned(student, images=800, held_out=held, held_out_every=300, out=tmp_path)
    assert [entry.images for entry in result.held_out] == [0, 304, 600, 800]
    assert result.held_out[0].student == result.held_out[0].ema == before
    assert result.held_out[-1].student == held_out_loss(student, held) < 0.8 * before
    assert result.ema is not None
    assert result.held_out[-1].ema == held_out_loss(result.ema, held)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["losses"]["loss"] == list(result.losses)
    assert saved["config"] == json.loads((tmp_path / "config.json").read_text())
    assert saved["config"]["images"] == 800


def test_held_out_loss_for_equal_arguments_is_equal() -> None:
    model, data = Denoiser(dropout=0.5), (images(), labels())
    first = held_out_loss(model, data)
    assert held_out_loss(model, data) == first != held_out_loss(model, data, seed=1)
    assert model.training
    zero = Denoiser()
    nn.init.zeros_(zero.levels.weight)
    nn.init.zeros_(zero.mix.weight)
    nn.init.zeros_(zero.mix.bias)
    assert held_out_loss(zero, images(4000), draws=1) == pytest.approx(1.0, abs=0.03)


def test_finetune_with_max_grad_norm_clips_the_gradient() -> None:
    student = Denoiser()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    before = weights(student)
    tuned(student, optimizer=optimizer, images=8, max_grad_norm=1e-3)
    assert (weights(student) - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_finetune_attaches_sr_ste_and_removes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Handle:
        def remove(self) -> None:
            calls.append("removed")

    def attach(optimizer: Any, model: Any, **options: Any) -> Handle:
        calls.append((model, options))
        return Handle()

    monkeypatch.setattr("sparsedm_compiler.train.session.sr_ste", attach)
    student = sdm.compile(Denoiser(), pattern="2:4", policy="all", backend="eager")
    tuned(student)
    assert calls == []
    tuned(student, sr_ste_lambda=1e-3, sr_ste_form="decoupled")
    assert calls == [(student, {"lam": 1e-3, "form": "decoupled"}), "removed"]


def test_finetune_of_a_compiled_student_masks_student_and_ema() -> None:
    size = {"img_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}
    teacher = UViT(**size, num_classes=3)
    data = torch.randn(16, 1, 4, 4), labels(16)
    weights_by_lambda = []
    for lam in (0.0, 10.0):
        student = sdm.compile(teacher, pattern="1:4", backend="eager")
        result = tuned(student, data, teacher=teacher, sr_ste_lambda=lam)
        weights_by_lambda.append(weights(student))
        assert result.ema is not None
        held_out_loss(result.ema, data)
        assert sdm.explain(result.ema).masked == sdm.explain(student).masked != ()
    assert not torch.equal(*weights_by_lambda)


def test_finetune_with_a_nan_loss_stops_before_the_update(tmp_path: Path) -> None:
    student, broken = Denoiser(), images()
    broken[3] = math.nan
    before = weights(student)
    with pytest.raises(DataError, match="the first images of the data hold NaN or Inf"):
        tuned(student, broken, batch_size=20)
    assert torch.equal(weights(student), before)
    student.classes.weight.data[2] = math.nan
    before = weights(student)
    says = f"the loss is nan after 0 images: .* no checkpoint has been saved in {tmp_path} yet"
    with pytest.raises(SparseDMError, match=says):
        tuned(student, out=tmp_path)
    torch.testing.assert_close(weights(student), before, equal_nan=True)


def test_finetune_with_mixed_up_models_raises() -> None:
    student = Denoiser()
    with pytest.raises(ConfigError, match="share parameters"):
        tuned(student, teacher=student)
    with pytest.raises(ConfigError, match="does not have"):
        tuned(student, optimizer=torch.optim.SGD(Denoiser().parameters(), lr=1.0))
    with pytest.raises(ConfigError, match="requires_grad"):
        tuned(Denoiser().requires_grad_(False))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 1.0}, "no option 'learning_rate'"),
        ({"images": 0}, "images 0"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"beta": math.nan}, "beta nan"),
        ({"schedule": "step"}, "'cosine' nor 'constant'"),
        ({"ema_decay": 1.0}, "ema_decay 1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm 0.0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm inf of a fine-tune is not a finite number"),
        ({"lr": True}, "lr True of a fine-tune is not a number"),
        ({"lr": 10**400}, "lr 1000.* is not a finite number"),
        ({"images": 0.5}, "images 0.5 of a fine-tune is not a whole number"),
        ({"images": math.nan}, "images nan of a fine-tune is not a whole number"),
        ({"batch_size": "8"}, "batch_size '8' of a fine-tune is not a whole number"),
        ({"warmup_images": 1.5}, "warmup_images 1.5 of a fine-tune is not a whole number"),
        ({"workers": -1}, "workers -1 of a fine-tune is not >= 0"),
        ({"accumulation": 1.5}, "accumulation 1.5 of a fine-tune is not a whole number"),
        ({"keep": True}, "keep True of a fine-tune is not a whole number"),
        ({"save_every": 0.5}, "save_every 0.5 of a fine-tune is not a whole number"),
        ({"log_every": 0}, "log_every 0 is not > 0; None switches it off"),
        ({"seed": 1.5}, "seed 1.5 of a fine-tune is not a whole number"),
        ({"seed": 2**64}, r"seed 18446744073709551616 of a fine-tune is not from -2\^63"),
        ({"seed": -(2**63) - 1}, r"of a fine-tune is not from -2\^63 to 2\^64 - 1"),
        ({"null_label": 1.5}, "null_label 1.5 of a fine-tune is not a whole number"),
        ({"drop_condition": "half"}, "drop_condition 'half' of a fine-tune is not a number"),
        ({"ema_decay": "slow"}, "ema_decay 'slow' of a fine-tune is not a number"),
        ({"ema_decay": False}, "ema_decay False of a fine-tune is not a number"),
        ({"betas": 1}, "betas 1 of a fine-tune are not two numbers"),
        ({"betas": [0.9]}, r"betas \(0.9,\) of a fine-tune are not two numbers"),
        ({"betas": ["a", "b"]}, "betas: 'a' of a fine-tune is not a number"),
        ({"betas": [0.9, 1.5]}, r"betas \[0.9, 1.5\] of a fine-tune are not in \[0, 1\)"),
        ({"betas": [math.nan, 0.9]}, "betas: nan of a fine-tune is not a finite number"),
        ({"flip": "no"}, "flip 'no' of a fine-tune is neither true nor false"),
        ({"sr_ste_form": "papers"}, "sr_ste_form 'papers' is neither 'paper' nor 'decoupled'"),
        ({"stages": "3:4"}, "stages '3:4' is no list of patterns"),
        ({"stages": ["3:4", "2:4"]}, r"stages \['3:4', '2:4'\] are for a staged run"),
        ({"sample_every": 8}, "sample_every 8 does nothing without sample_grids"),
        ({"method": {"dense": 1}}, "method {'dense': 1} is none of"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "no add_noise"),
        ({"scheduler": EulerDiscreteScheduler()}, "does not preserve variance"),
        ({"scheduler": DDPMScheduler(prediction_type="v_prediction")}, "'v_prediction'"),
    ],
)
def test_finetune_config_with_invalid_options_raises(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tuned(Denoiser(), **options)


def test_counts_that_are_whole_floats_are_taken_as_whole_numbers() -> None:
    config = FinetuneConfig.create(images=1e3, batch_size=8.0, save_every=500.0, lr=1.0)
    counts = config.images, config.batch_size, config.save_every
    assert counts == (1000, 8, 500)
    assert all(type(count) is int for count in counts)
    assert type(config.lr) is float


GRIDS: list[tuple[dict[str, Any], str]] = [
    ({"sampler": "foo"}, "no sampler is called 'foo'"),
    ({"steps": 5000}, "cannot take 5000 steps, as it has 1000 noise levels: lower steps"),
    ({"shape": (1, 0)}, r"shape .* is not images x channels"),
    ({"condition": torch.zeros(3).long()}, r"\[3\] has no row for each of 4"),
    ({"guidance": Guidance(2.0, null=1)}, "guidance 2.0 needs labels or a condition"),
    ({"objective": "flow", "sampler": "ddim"}, "sampler 'ddim' does not follow a flow"),
]


@pytest.mark.parametrize(("options", "words"), GRIDS, ids=[words for _, words in GRIDS])
def test_sample_grids_that_cannot_be_drawn_raise_before_the_training(
    options: dict[str, Any], words: str
) -> None:
    student, settings = Denoiser(), {"shape": (1, 2, 2), "count": 4, **options}
    before, objective = weights(student), settings.pop("objective", "eps")
    with pytest.raises(SparseDMError, match=words):
        tuned(student, sample_grids=SampleGrids(**settings), objective=objective)
    assert torch.equal(weights(student), before)


@pytest.mark.parametrize("name", ["count", "columns", "steps", "batch_size"])
def test_sample_grids_with_options_out_of_range_raise(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} 0 of sample grids is not >= 1"):
        SampleGrids((1, 2, 2), **{name: 0})
    with pytest.raises(ConfigError, match=f"{name} '4' of sample grids is not a whole number"):
        SampleGrids((1, 2, 2), **{name: "4"})
    with pytest.raises(ConfigError, match=r"seed 0\.5 of sample grids is not a whole number"):
        SampleGrids((1, 2, 2), seed=0.5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((images(4), labels(3)), "4 images, but 3 labels"),
        (images(0), "no images"),
        (images().byte(), "scale them"),
        ("digits", "of type str"),
        ([{"pixel_values": images()}], "of type dict"),
        (iter([images(8)]), "not a generator"),
    ],
)
def test_finetune_with_unusable_data_raises(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        tuned(Denoiser(), data)


def test_finetune_with_a_prediction_of_another_shape_raises() -> None:
    class Doubled(Denoiser):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Any:
            return torch.cat([x, x, x], dim=1)

    with pytest.raises(DataError, match="shaped like its input"):
        tuned(Doubled())
