"""``detect_pattern``: the exact pattern of the zeros of a weight, and models that run by it."""

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
def test_detect_pattern_of_a_masked_weight_returns_its_pattern(
    text: str, kernel: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    pattern = Pattern.parse(text)
    weight = torch.randn(32, 128, *kernel)
    detected = detect_pattern(weight * nm_mask(weight, pattern))
    assert detected is not None
    assert detected.density == pattern.density
    assert detected.height == pattern.height
    assert detected.m <= pattern.m
    masked = weight * nm_mask(weight, pattern)
    assert_same(masked * nm_mask(masked, detected), masked)


@pytest.mark.parametrize(("text", "plain"), [("1:4t", "1:4"), ("2:4t", "2:4"), ("3:4t", "3:4")])
def test_detect_pattern_of_a_transposable_mask_returns_the_per_row_pattern(
    text: str, plain: str
) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    masked = weight * nm_mask(weight, text)
    for view in (masked, masked.T):
        assert str(detect_pattern(view)) == plain
        assert_same(view * nm_mask(view, plain), view)


def test_detect_pattern_with_one_value_too_many_returns_another_pattern() -> None:
    weight = torch.randn(32, 128)
    weight *= nm_mask(weight, Pattern.parse("2:4"))
    weight[7, 40:44] = 1.0
    detected = detect_pattern(weight)
    assert detected is not None
    assert detected.m > 4
    assert_same(weight * nm_mask(weight, detected), weight)


@pytest.mark.parametrize(
    "weight", [torch.randn(8, 8), torch.zeros(8, 8), torch.randn(8), torch.empty(0, 8)]
)
def test_detect_pattern_of_a_weight_without_pattern_returns_none(weight: torch.Tensor) -> None:
    assert detect_pattern(weight) is None


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    with torch.no_grad():
        for layer, text in zip(model, ("2:4", "1:8", "1:4x4"), strict=False):
            layer.weight.mul_(nm_mask(layer.weight, Pattern.parse(text)))
    return model


def test_compile_without_a_pattern_runs_every_weight_by_its_own() -> None:
    model, x = net(), torch.randn(3, 32)
    fast = sdm.compile(model, mode="infer", backend="eager", kernels={"*": "sparse"})
    assert_same(fast(x), model(x).detach(), tolerance=1e-5)
    explanation = sdm.explain(fast)
    assert [str(row.pattern) for row in explanation.rows] == ["2:4", "1:8", "1:4x4", "None"]
    assert explanation.rows[3].refusal == "its values satisfy no N:M pattern"
    assert {choice.kernel for choice in explanation.choices} == {"cpu_free", "cpu_shared"}
    options = {"backend": "eager", "kernels": {"*": "sparse"}}
    with torch.no_grad():
        plain = torch.compile(model, backend="sparsedm", options=options)
        assert_same(plain(x), fast(x))


def test_compile_without_a_pattern_raises_where_none_is_detected() -> None:
    with pytest.raises(sdm.ConfigError, match="no weight of Linear satisfies an N:M pattern"):
        sdm.compile(nn.Linear(8, 8), mode="infer")
    with pytest.raises(sdm.ConfigError, match="without a pattern"):
        sdm.compile(nn.Linear(8, 8))
