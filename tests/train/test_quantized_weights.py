"""Students and teachers of which some weights are torchao's, in 8 bits: they stay as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

import sparsedm_compiler as sdm
from sparsedm_compiler.files import check_file
from sparsedm_compiler.models import UViT
from sparsedm_compiler.packed_tensors import take_apart
from tests.oracle import assert_same, brute_mask, masked_patterns
from tests.train.cases import data, student_of, teacher

PART = "mid_block.mlp"
BUDGET: dict[str, Any] = {"images": 32, "batch_size": 8, "lr": 1e-2, "progress": False}
INPUTS = (torch.ones(2, 1, 4, 4), torch.zeros(2), torch.zeros(2).long())


def quantized_teacher(seed: int = 0) -> UViT:
    model = teacher(seed)
    quantize_(model, Int8WeightOnlyConfig(), lambda layer, name: is_linear(layer, name))
    return model


def is_linear(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, nn.Linear) and name.startswith(PART)


def read_codes(model: nn.Module) -> list[Tensor]:
    found = [weight for weight in model.parameters() if isinstance(weight, Int8Tensor)]
    assert len(found) == 2
    return [part for weight in found for part in (weight.qdata, weight.scale)]


@pytest.mark.parametrize("only", ["all", "lora"])
def test_student_with_some_weights_in_eight_bits_trains_is_saved_and_resumes(
    only: str, tmp_path: Path
) -> None:
    model = quantized_teacher()
    options = {**BUDGET, "only": only, "lora_rank": 2, "save_every": 16, "out": tmp_path}
    student = student_of(model)
    result = sdm.finetune(student, model, data(), **options)
    assert result.losses[-1] < result.losses[0]
    assert result.ema is not None
    for trained in (student, result.ema):
        assert all(map(torch.equal, read_codes(trained), read_codes(model)))
    patterns = masked_patterns(result.ema)
    assert not any(name.startswith(PART) for name in patterns)
    for name in patterns:
        before, after = (m.get_parameter(name) for m in (model, result.ema))
        pruned = after * brute_mask(after, "1:4")
        assert not torch.equal(pruned, before * brute_mask(before, "1:4"))
    loaded = sdm.load(tmp_path / "student.safetensors", quantized_teacher(3), backend="eager")
    assert_same(loaded(*INPUTS), result.ema(*INPUTS))

    (tmp_path / "results.json").unlink()
    shutil.rmtree(sorted((tmp_path / "checkpoints").iterdir())[-1])
    again = student_of(quantized_teacher())
    assert sdm.finetune(again, model, data(), **options).losses == result.losses
    for name, weight in take_apart(student.state_dict()).items():
        assert_same(take_apart(again.state_dict())[name], weight)


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear")
def test_adapter_at_a_weight_in_eight_bits_is_refused_before_the_run() -> None:
    student = student_of(quantized_teacher())
    name = f"{PART}.fc1"
    student = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[name]), student)
    with pytest.raises(sdm.ConfigError, match=f"'{name}' could not be merged .*Int8Tensor"):
        sdm.finetune(student, teacher(), data(), only="lora", **BUDGET)
    student(*INPUTS)
    with pytest.raises(sdm.ConfigError, match=r"it is for a weight that is packed .*Int8Tensor"):
        sdm.merge_lora(student)


@pytest.mark.parametrize("form", ["state", "dense", "compact"])
def test_file_holds_quantized_weights_as_the_library_has_them(form: str, tmp_path: Path) -> None:
    model = student_of(quantized_teacher())
    expected = model(*INPUTS)
    path = tmp_path / "model.safetensors"
    sdm.save(model, path, form=form)
    assert f"{PART}.fc1.weight:qdata" in str(check_file(path))
    loaded = sdm.load(path, quantized_teacher(3), backend="eager")
    assert all(map(torch.equal, read_codes(loaded), read_codes(model)))
    assert_same(loaded(*INPUTS), expected)
    with pytest.raises(sdm.CheckpointError, match=r"unknown .*fc1.weight:qdata"):
        sdm.load(path, teacher(), backend="eager")


def test_file_whose_model_is_quantized_only_elsewhere_is_refused(tmp_path: Path) -> None:
    model = student_of(teacher())
    model(*INPUTS)
    path = tmp_path / "model.safetensors"
    sdm.save(model, path)
    with pytest.raises(sdm.CheckpointError, match=r"it lacks mid_block\.mlp\.fc1\.weight:qdata"):
        sdm.load(path, quantized_teacher(), backend="eager")
