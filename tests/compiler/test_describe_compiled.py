"""What ``explain`` says of the machine, beside the kernels."""

from __future__ import annotations

import platform
from typing import Literal

import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends import processor
from sparsedm_compiler.compiler import describe_compiled
from sparsedm_compiler.compiler.describe_compiled import SLOW_BFLOAT16


def describe(dtype: torch.dtype, mode: Literal["train", "infer"]) -> sdm.Explanation:
    net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)]).to(dtype)
    compiled = sdm.compile(net, "2:4", mode=mode, backend="eager", kernels={"*": "dense"})
    return sdm.explain(compiled, torch.zeros(1, 16, dtype=dtype))


def test_explain_of_a_bfloat16_model_on_a_cpu_without_its_instructions_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(describe_compiled, "lacks_bfloat16", lambda: True)
    told = describe(torch.bfloat16, "infer")
    assert told.notes == (SLOW_BFLOAT16,)
    assert str(told).endswith(SLOW_BFLOAT16)
    assert describe(torch.float32, "infer").notes == ()
    assert describe(torch.bfloat16, "train").notes == ()
    monkeypatch.setattr(describe_compiled, "lacks_bfloat16", lambda: False)
    assert describe(torch.bfloat16, "infer").notes == ()


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("tiles", [False, True])
def test_lacks_bfloat16_on_x86_is_told_by_both_instruction_sets(
    dot: bool, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dot)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert processor.lacks_bfloat16() == (not dot and not tiles)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not processor.lacks_bfloat16()
