"""Optimizers of other packages: SR-STE, saliency, frozen masks and checkpoints work with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, optional_deps
from sparsedm_compiler.models import UViT
from sparsedm_compiler.optimizer_state import clear_where
from sparsedm_compiler.train import FinetuneConfig
from sparsedm_compiler.train.memory import estimate_memory
from sparsedm_compiler.train.optimizers import (
    OPTIMIZERS,
    count_state_bytes,
    get_second_moment,
    make_optimizer,
)
from tests.train.cases import short, student_of, teacher, weights

EIGHT_BITS = ["bnb-adamw8bit", "torchao-adamw8bit"]


def step_linear(name: str) -> tuple[torch.optim.Optimizer, nn.Linear]:
    """An optimizer after two steps on a layer of which the weight, not the bias, takes 8 bits."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 128)
    optimizer = make_optimizer(name, layer.parameters(), {"lr": 1e-3, "weight_decay": 0.0})
    for _ in range(2):
        layer(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
    return optimizer, layer


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw"])
def test_optimizer_of_a_package_that_is_missing_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = OPTIMIZERS[name].package
    monkeypatch.setattr(optional_deps, "is_installed", lambda name: name != package)
    says = f"optimizer '{name}' is one of {package}, which is not installed: pip install {package}"
    with pytest.raises(ConfigError, match=says):
        short("sparsedm", optimizer=name)


def test_optimizer_options_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer 'adam' is neither 'adamw', 'bnb-adamw8bit'"):
        short("sparsedm", optimizer="adam")
    with pytest.raises(ConfigError, match="shard=True spreads the state of optimizer 'adamw'"):
        FinetuneConfig.create(optimizer="bnb-adamw8bit", shard=True)


@pytest.mark.parametrize("name", ["adamw", *EIGHT_BITS])
def test_state_of_an_optimizer_has_the_computed_size_and_its_moment(name: str) -> None:
    optimizer, layer = step_linear(name)
    plain, _ = step_linear("adamw")
    states = [optimizer.state[p] for p in layer.parameters()]
    shared = {}
    for state in states:
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and not key.startswith("qmap"):
                parts = vars(value).values() if "codes" in vars(value) else [value]
                shared |= {id(p): p.nbytes for p in parts if isinstance(p, torch.Tensor)}
    assert sum(shared.values()) == count_state_bytes(layer.parameters(), name)
    for own, expected in zip(states, plain.state.values(), strict=True):
        moment = get_second_moment(own)
        assert moment is not None
        torch.testing.assert_close(moment, expected["exp_avg_sq"], rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", *EIGHT_BITS])
def test_state_of_pruned_weights_is_cleared_in_any_number_of_bits(name: str) -> None:
    optimizer, layer = step_linear(name)
    pruned = torch.zeros(128, 64, dtype=torch.bool)
    pruned[:, ::2] = True
    before = get_second_moment(optimizer.state[layer.weight])
    clear_where(pruned, optimizer.state[layer.weight])
    after = get_second_moment(optimizer.state[layer.weight])
    assert before is not None
    assert after is not None
    assert (after[:, ::2] == 0).all()
    assert torch.equal(after[:, 1::2], before[:, 1::2])
    start = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(start)
    optimizer.step()
    assert torch.equal(layer.weight[:, ::2], start[:, ::2])  # no momentum moves them


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_run_by_an_optimizer_of_eight_bits_is_resumed_to_the_bit(name: str, tmp_path: Path) -> None:
    model = UViT(img_size=4, in_chans=1, embed_dim=64, depth=0, num_heads=2, num_classes=4)
    common: dict[str, Any] = {"score": "saliency", "freeze": 0.5, "images": 32, "teacher": model}
    given = {**common, "optimizer": name, "save_every": 16, "held_out": None}
    whole, student = short("sparsedm", tmp_path, **given)
    plain, _ = short("sparsedm", **common)
    files = sorted((tmp_path / "checkpoints").glob("*/optimizer.safetensors"))
    plain_size = 8 * sum(p.numel() for p in model.parameters())
    assert files[-1].stat().st_size < 0.5 * plain_size
    assert whole.losses == pytest.approx(plain.losses, rel=0.1)
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    for path in (*last.iterdir(), tmp_path / "results.json"):
        path.unlink()
    last.rmdir()
    again, resumed = short("sparsedm", tmp_path, **given)
    assert again.losses == whole.losses
    assert all(map(torch.equal, weights(student), weights(resumed)))


def test_paged_optimizer_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="pages its state between a card and the host"):
        sdm.finetune(student_of(teacher()), None, torch.zeros(8, 1, 4, 4), images=8,
                     optimizer="bnb-paged-adamw8bit")  # fmt: skip


def test_memory_of_eight_bits_is_a_quarter_of_that_of_adamw() -> None:
    def compute(name: str) -> int:
        config = FinetuneConfig(batch_size=1, optimizer=name)
        layer = nn.Linear(4096, 4096)
        return estimate_memory(
            layer, config, lambda count: ((torch.zeros(count, 4096),), {})
        ).optimizer

    plain = compute("adamw")
    for name in EIGHT_BITS:
        assert compute(name) == pytest.approx(plain / 4, rel=0.05)
