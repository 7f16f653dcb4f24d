"""Mixed precision: products in bfloat16, weights, average and checkpoints in float32."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.train.ema import Ema
from sparsedm_compiler.train.session import _check_narrow_weights
from tests.train.cases import CLASSES, data, short, student_of, teacher, weights

ALONE: dict[str, Any] = {
    **{"batch_size": 8, "lr": 1e-2, "flip": True, "drop_condition": 0.2, "null_label": CLASSES},
    **{"max_grad_norm": 0.5, "progress": False},
}
"""Options of ``short`` for a run without a teacher."""


@pytest.mark.parametrize("method", ["sparsedm", "dense"])
def test_finetune_in_bfloat16_is_close_to_float32(method: str, tmp_path: Path) -> None:
    plain, _ = short(method)
    mixed, student = short(method, tmp_path, mixed_precision="bf16")
    assert mixed.losses == pytest.approx(plain.losses, rel=0.02)
    assert mixed.losses != plain.losses
    assert {weight.dtype for weight in weights(student)} == {torch.float32}
    assert mixed.ema is not None
    assert {weight.dtype for weight in weights(mixed.ema)} == {torch.float32}
    again, resumed = short(method, tmp_path, mixed_precision="bf16")
    assert again.losses == mixed.losses
    assert all(map(torch.equal, weights(resumed), weights(student)))


def test_finetune_in_bfloat16_multiplies_masked_bfloat16_weights() -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    model = teacher()
    layer = model.mid_block.mlp.fc1
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    short("dense", student=model, mixed_precision="bf16", images=8)
    assert torch.bfloat16 in {out for _, out in seen}
    _, student = short(mixed_precision="bf16", images=8)
    for weight, pattern in sdm.masked_parameters(student).values():
        assert nm_mask(weight, pattern).float().mean().item() == float(pattern.density)


def test_finetune_twice_in_one_process_with_another_precision_works() -> None:
    before, _ = short("ste")
    short("ste", mixed_precision="bf16")
    assert short("ste")[0].losses == before.losses


@pytest.mark.parametrize(
    ("taught", "trained"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_finetune_when_teacher_and_student_differ_in_dtype_runs_each_in_its_own(
    taught: torch.dtype, trained: torch.dtype, tmp_path: Path
) -> None:
    model, seen = teacher().to(taught), set()
    model.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    options: dict[str, Any] = {"images": 24, "held_out_every": None}
    plain = short(**options)[0]
    options |= {"teacher_cache": tmp_path}
    warned = pytest.warns(UserWarning, match="1/256 of a value")
    with warned if trained.itemsize == 2 else nullcontext():
        result, student = short(teacher=model, student=student_of(teacher().to(trained)), **options)
        alone = sdm.finetune(student_of(teacher().to(trained)), None, data(), **ALONE, **options)
    assert seen == {taught}
    assert result.ema is not None
    dtypes = {weight.dtype for weight in (*weights(student), *weights(result.ema))}
    assert dtypes == {trained}
    assert result.losses == pytest.approx(plain.losses, rel=0.03)
    assert result.losses != plain.losses
    assert alone.losses == result.losses


def test_average_of_bfloat16_weights_keeps_what_bfloat16_would_round_away() -> None:
    model = nn.Linear(4, 4).bfloat16()
    average = Ema(model, decay=0.9999)
    average.updates = 10**6  # past the warm-up
    exact = [weight.detach().double() for weight in model.parameters()]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
        for _ in range(200):
            average.update()
            now = [weight.double() for weight in model.parameters()]
            exact = [value.lerp(own, 1e-4) for value, own in zip(exact, now, strict=True)]
    state = average.state_dict()
    for value, right in zip(state.values(), exact, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=0)
    assert {weight.dtype for weight in average.copy_model(model).parameters()} == {torch.bfloat16}


def test_average_of_frozen_bfloat16_weights_takes_no_more_memory_than_they() -> None:
    model = nn.Linear(4, 4).bfloat16()
    model.weight.requires_grad_(False)
    state = Ema(model, decay=0.9999).state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "weight": torch.bfloat16,
        "bias": torch.float32,
    }


def test_outputs_of_a_teacher_when_its_first_student_is_in_bfloat16_are_those_for_any(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"images": 8, "held_out": None, "held_out_every": None}
    with pytest.warns(UserWarning, match=r"weights train in bfloat16.*mixed_precision='bf16'"):
        short(student=student_of(teacher().bfloat16()), teacher_cache=tmp_path, **options)
    assert short(teacher_cache=tmp_path, **options)[0].losses == short(**options)[0].losses


def test_finetune_in_float16_on_a_cpu_raises() -> None:
    with pytest.raises(ConfigError, match=r"fp16.*GPU"):
        short("ste", mixed_precision="fp16")


def test_finetune_with_an_unknown_precision_raises() -> None:
    with pytest.raises(ConfigError, match="mixed_precision 'fp8'"):
        short("ste", mixed_precision="fp8")


def test_weights_in_float16_are_refused_where_their_gradients_are_scaled() -> None:
    weights = [nn.Parameter(torch.ones(2, dtype=torch.float16)), nn.Parameter(torch.ones(2))]
    with pytest.raises(ConfigError, match="1 weights train in float16, whose scaled gradients"):
        _check_narrow_weights(weights, sdm.FinetuneConfig(mixed_precision="fp16"))
    with pytest.warns(UserWarning, match="train in float16"):
        _check_narrow_weights(weights, sdm.FinetuneConfig())
