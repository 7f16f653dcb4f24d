"""Mixed precision: products in bfloat16, weights, average and checkpoints in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError
from sparsedm_compiler.masks.nm_mask import nm_mask
from tests.train.cases import short, teacher, weights


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


def test_finetune_in_float16_on_a_cpu_raises() -> None:
    with pytest.raises(ConfigError, match=r"fp16.*GPU"):
        short("ste", mixed_precision="fp16")


def test_finetune_with_an_unknown_precision_raises() -> None:
    with pytest.raises(ConfigError, match="mixed_precision 'fp8'"):
        short("ste", mixed_precision="fp8")
