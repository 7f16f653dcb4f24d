"""A model in mode "infer" that is cast: the masks stay those of the weights before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler.masked_state import copy_masked
from sparsedm_compiler.masks.nm_mask import nm_mask
from tests.compiler.nets import Chain
from tests.oracle import OPTIONS, assert_same, oracle_of

WIDTH = 128
X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


def close(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:4x4", "1:2@8x8", "2:4t"])
@pytest.mark.parametrize("called", [True, False], ids=["called", "not called"])
@pytest.mark.parametrize("finalize", [False, True])
def test_model_when_cast_keeps_its_masks(
    finalize: bool, called: bool, pattern: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    student = sdm.compile(Chain(WIDTH), pattern, backend="eager")
    student(X)
    oracle = oracle_of(student).to(dtype)
    fast = sdm.compile(student, mode="infer", backend="eager", finalize=finalize)
    with torch.no_grad():
        if called:
            fast(X)
        fast.to(dtype)
        assert_same(fast(X.to(dtype)), oracle(X.to(dtype)), tolerance=close(dtype))
    for name, value in fast.state_dict().items():
        assert_same(value, oracle.state_dict()[name])
    with torch.no_grad():
        again = fast.float()(X)
    assert_same(again, oracle.float()(X), tolerance=1e-5)


def test_weights_when_cast_have_ties_that_choose_another_mask() -> None:
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH)
    masks = [nm_mask(w, "2:4") for w in (weight, weight.bfloat16())]
    assert not torch.equal(*masks)


@pytest.mark.parametrize("move", ["to device", "share_memory", "again"])
def test_model_when_moved_keeps_its_parameters(move: str) -> None:
    student = sdm.compile(Chain(), "2:4", backend="eager", **OPTIONS["infer"])
    x = X[:, :16]
    out = student(x)
    before = copy.deepcopy(dict(student.named_parameters()))
    moves: dict[str, Any] = {
        "to device": lambda: student.to("cpu"),
        "share_memory": student.share_memory,
        "again": lambda: student.to(torch.float32),
    }
    moves[move]()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name])
    assert_same(student(x), out)


def test_model_in_a_wrapper_when_cast_keeps_frozen_masks() -> None:
    torch.manual_seed(0)
    student = sdm.compile(Chain(WIDTH), "2:4", backend="eager")
    student(X)
    sdm.freeze_masks(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(torch.randn_like(parameter))
    oracle = copy_masked(student).bfloat16()
    assert not hasattr(oracle, "_sparsedm")
    fast = sdm.compile(student, mode="infer", backend="eager")
    nn.ModuleDict({"unet": fast}).bfloat16()
    x = X.bfloat16()
    assert_same(fast(x), oracle(x), tolerance=close(torch.bfloat16))
