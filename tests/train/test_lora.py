"""Fine-tuning of adapters alone, beside a frozen sparse base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.files import check_file
from sparsedm_compiler.models import UViT
from sparsedm_compiler.train import FinetuneConfig
from tests.oracle import assert_same, brute_mask, masked_patterns
from tests.train.cases import data, student_of, teacher, weights

EIGHT_BITS = ["bnb-adamw8bit", "torchao-adamw8bit"]

BUDGET: dict[str, Any] = {"images": 32, "batch_size": 8, "lr": 1e-2, "progress": False}
LORA: dict[str, Any] = {**BUDGET, "only": "lora", "lora_rank": 2}


def test_adapters_alone_train_and_are_merged_without_leaving_the_pattern() -> None:
    model = teacher()
    student = student_of(model)
    result = sdm.finetune(student, model, data(), **LORA)
    before = model.state_dict()
    assert {*student.state_dict()} == {*before}
    patterns = masked_patterns(student)
    linear = {f"{name}.weight" for name, m in model.named_modules() if type(m) is nn.Linear}
    assert patterns.keys() <= linear
    for name, tensor in student.state_dict().items():
        if name in patterns:
            assert_same(tensor, tensor * brute_mask(tensor, "1:4"))
            assert not torch.equal(tensor, before[name] * brute_mask(before[name], "1:4"))
        elif name not in linear:
            assert_same(tensor, before[name])
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert result.ema is not None
    assert {*result.ema.state_dict()} == {*before}


def test_student_of_adapters_is_saved_merged_and_its_finished_run_gives_the_same(
    tmp_path: Path,
) -> None:
    model = teacher()
    result = sdm.finetune(student_of(model), model, data(), out=tmp_path, **LORA)
    assert result.ema is not None
    saved = sdm.load(tmp_path / "student.safetensors", model, backend="eager")
    for name, tensor in result.ema.state_dict().items():
        assert_same(saved.state_dict()[name], tensor)
    report = check_file(tmp_path / "student.safetensors")
    assert report.provenance == {"method": "sparsedm", "images": 32}
    checkpoints = sorted((tmp_path / "checkpoints").iterdir())
    for later in (checkpoints[-1], tmp_path / "results.json"):  # as if it had been interrupted
        for path in sorted(later.glob("*")) or [later]:
            path.unlink()
    checkpoints[-1].rmdir()
    resumed = sdm.finetune(student_of(model), model, data(), out=tmp_path, **LORA)
    assert resumed.losses == result.losses
    assert resumed.ema is not None
    for name, tensor in result.ema.state_dict().items():
        assert_same(resumed.ema.state_dict()[name], tensor)


def test_adapters_that_a_student_has_are_those_that_train() -> None:
    model = teacher()
    student = student_of(model)
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    config = peft.LoraConfig(r=1, target_modules=names[:1])
    student = peft.inject_adapter_in_model(config, student)
    sdm.finetune(student, model, data(), **{**LORA, "ema_decay": None})
    before = model.state_dict()
    changed = [
        n for n, tensor in student.state_dict().items() if not torch.equal(tensor, before[n])
    ]
    assert changed == [f"{names[0]}.weight"]


def test_student_without_linear_layers_is_refused() -> None:
    student = sdm.compile(nn.Conv2d(8, 8, 1), "2:4", policy="all", backend="eager")
    with pytest.raises(sdm.ConfigError, match="Conv2d has no linear layer"):
        sdm.finetune(student, nn.Conv2d(8, 8, 1), torch.zeros(8, 8, 2, 2), **LORA)
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dense", "only": "lora"},
        {"only": "lora", "shard": True},
        {"only": "lora", "static_mask": True},
    ],
    ids=str,
)
def test_adapters_alone_beside_what_does_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(sdm.ConfigError, match="only='lora' is for methods with masks"):
        FinetuneConfig.create(**options)


def test_unknown_choice_of_parameters_is_refused() -> None:
    with pytest.raises(sdm.ConfigError, match="only 'heads' is neither 'all' nor 'lora'"):
        FinetuneConfig.create(only="heads")
    with pytest.raises(sdm.ConfigError, match="lora_rank 0"):
        FinetuneConfig.create(lora_rank=0)


def test_adapters_alone_train_alike_from_cached_outputs_with_checkpointed_blocks(
    tmp_path: Path,
) -> None:
    model = teacher()
    plain = sdm.finetune(student_of(model), model, data(), **LORA)
    options = {**LORA, "teacher_cache": tmp_path, "gradient_checkpointing": True}
    first = sdm.finetune(student_of(model), model, data(), **options)
    second = sdm.finetune(student_of(model), None, data(), **options)
    assert plain.losses == first.losses == second.losses
    assert plain.ema is not None
    assert second.ema is not None
    for name, tensor in plain.ema.state_dict().items():
        assert_same(second.ema.state_dict()[name], tensor)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_adapters_when_their_optimizer_is_of_eight_bits_train_and_resume(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = UViT(img_size=4, in_chans=1, embed_dim=64, depth=0, num_heads=2, num_classes=4)
    options: dict[str, Any] = {**LORA, "lora_rank": 64, "save_every": 16, "ema_decay": None}
    given = {**options, "optimizer": name, "out": tmp_path}
    plain, student = student_of(model), student_of(model)
    losses = sdm.finetune(plain, model, data(), **options).losses
    result = sdm.finetune(student, model, data(), **given)
    assert result.losses == pytest.approx(losses, rel=0.1)
    for weight, before in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, before, rtol=0, atol=0.1)
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    kept = load_file(last / "optimizer.safetensors").values()
    assert torch.uint8 in {tensor.dtype for tensor in kept}
    size = sum(p.numel() for n, p in model.named_parameters() if n in sdm.get_masks(student))
    assert sum(tensor.nbytes for tensor in kept) < 8 * size  # of the adapters' moments alone
    for later in (last, tmp_path / "results.json"):
        for path in sorted(later.glob("*")) or [later]:
            path.unlink()
    last.rmdir()
    resumed = student_of(model)
    assert sdm.finetune(resumed, model, data(), **given).losses == result.losses
    assert all(map(torch.equal, weights(student), weights(resumed)))


class EightBitLinear(nn.Module):
    """A frozen linear layer whose weight is kept as integers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.abs().max().item() / 127
        codes = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).T


def test_adapters_when_some_of_the_base_is_in_eight_bits_train_and_leave_it() -> None:
    model = teacher()
    model.mid_block.mlp.fc2 = EightBitLinear(model.mid_block.mlp.fc2)
    codes = model.mid_block.mlp.fc2.weight.clone()
    student = student_of(model)
    result = sdm.finetune(student, teacher(), data(), **LORA)
    assert result.ema is not None
    for trained in (student, result.ema):
        assert_same(trained.get_parameter("mid_block.mlp.fc2.weight"), codes)
    before, after = (m.get_parameter("mid_block.attn.qkv.weight") for m in (model, result.ema))
    assert not torch.equal(before * (after != 0), after)
