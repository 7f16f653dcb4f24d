"""Fine-tuning of adapters alone, beside a frozen sparse base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.files import check_file
from sparsedm_compiler.train import FinetuneConfig
from tests.oracle import assert_same, brute_mask, masked_patterns
from tests.train.cases import data, student_of, teacher

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
