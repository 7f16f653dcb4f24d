"""Weights that satisfy a pattern already are found by it, exactly, and run by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler import Pattern
from sparsedm_compiler.masks.detect import detect_pattern
from sparsedm_compiler.masks.nm_mask import nm_mask
from tests.oracle import assert_same

TEXTS = ("1:2", "2:4", "1:4", "3:4", "1:8", "3:8", "1:16", "31:32", "1:64", "2:4x4", "1:8x16")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(TEXTS), st.sampled_from(((), (3, 3))), st.integers(0, 2**31))
def test_a_masked_weight_is_recognised(text: str, kernel: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    pattern = Pattern.parse(text)
    weight = torch.randn(32, 128, *kernel)
    found = detect_pattern(weight * nm_mask(weight, pattern))
    assert found is not None
    assert found.density == pattern.density
    assert found.height == pattern.height
    assert found.m <= pattern.m
    masked = weight * nm_mask(weight, pattern)
    assert_same(masked * nm_mask(masked, found), masked)


@pytest.mark.parametrize(("text", "plain"), [("1:4t", "1:4"), ("2:4t", "2:4"), ("3:4t", "3:4")])
def test_a_transposable_mask_is_one_of_the_plain_pattern(text: str, plain: str) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    masked = weight * nm_mask(weight, text)
    for each in (masked, masked.T):
        assert str(detect_pattern(each)) == plain
        assert_same(each * nm_mask(each, plain), each)


def test_one_value_too_many_is_not_overlooked() -> None:
    weight = torch.randn(32, 128)
    weight *= nm_mask(weight, Pattern.parse("2:4"))
    weight[7, 40:44] = 1.0
    found = detect_pattern(weight)
    assert found is not None
    assert found.m > 4
    assert_same(weight * nm_mask(weight, found), weight)


@pytest.mark.parametrize(
    "weight", [torch.randn(8, 8), torch.zeros(8, 8), torch.randn(8), torch.empty(0, 8)]
)
def test_what_satisfies_nothing(weight: torch.Tensor) -> None:
    assert detect_pattern(weight) is None


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    with torch.no_grad():
        for layer, text in zip(model, ("2:4", "1:8", "1:4x4"), strict=False):
            layer.weight.mul_(nm_mask(layer.weight, Pattern.parse(text)))
    return model


def test_a_plain_model_is_compiled_without_naming_its_pattern() -> None:
    model, x = net(), torch.randn(3, 32)
    fast = sdm.compile(model, mode="infer", backend="eager", kernels={"*": "sparse"})
    assert_same(fast(x), model(x).detach(), tolerance=1e-5)
    found = sdm.explain(fast)
    assert [str(row.pattern) for row in found.rows] == ["2:4", "1:8", "1:4x4", "None"]
    assert found.rows[3].refusal == "its values satisfy no N:M pattern"
    assert {choice.kernel for choice in found.choices} == {"cpu_free", "cpu_shared"}
    options = {"backend": "eager", "kernels": {"*": "sparse"}}
    with torch.no_grad():
        plain = torch.compile(model, backend="sparsedm", options=options)
        assert_same(plain(x), fast(x))


def test_nothing_to_recognise_is_said() -> None:
    with pytest.raises(sdm.ConfigError, match="no weight of Linear satisfies an N:M pattern"):
        sdm.compile(nn.Linear(8, 8), mode="infer")
    with pytest.raises(sdm.ConfigError, match="without a pattern"):
        sdm.compile(nn.Linear(8, 8))
