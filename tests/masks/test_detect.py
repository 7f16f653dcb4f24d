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
from sparsedm_compiler.patterns import NM, BlockNM, SharedNM
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


BLOCKS = (
    *("1:2@16x8", "1:4@16x16", "1:8@64x16", "3:4@32x32", "1:2@128x16", "5:16@16x8"),
    *("1:2@64x32+2:4", "1:4@16x16+2:4", "1:4@32x8+1:8", "3:4@16x8+3:4", "1:2@128x32+1:16"),
)


@pytest.mark.parametrize("text", BLOCKS)
@pytest.mark.parametrize("kernel", [(), (1, 3)])
def test_detect_pattern_of_whole_zero_blocks_returns_the_block_pattern(
    text: str, kernel: tuple[int, ...]
) -> None:
    pattern = Pattern.parse(text)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 6 * pattern.width, *kernel, generator=generator)
    assert str(detect_pattern(weight * nm_mask(weight, pattern))) == text


@pytest.mark.parametrize(
    ("text", "kind"),
    [("1:2@8x8", NM), ("1:2@16x4", NM), ("1:4x16", SharedNM), ("2:4", NM), ("1:3@16x8", BlockNM)],
)
def test_detect_pattern_of_other_blocks_keeps_every_non_zero(text: str, kind: type) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    weight *= nm_mask(weight, pattern)
    detected = detect_pattern(weight)
    assert detected is not None
    assert isinstance(detected, (kind, SharedNM))
    assert_same(weight * nm_mask(weight, detected), weight)


def test_detect_pattern_with_one_weight_in_a_zero_block_returns_another_pattern() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight *= nm_mask(weight, "1:2@32x16")
    first = weight[0, :32].view(2, 16)
    first[first.count_nonzero(1).argmin(), 3] = 1e-3
    detected = detect_pattern(weight)
    assert detected is None or str(detected) != "1:2@32x16"
    if detected is not None:
        assert_same(weight * nm_mask(weight, detected), weight)


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
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(5)])
    with torch.no_grad():
        for layer, text in zip(model, ("2:4", "1:8", "1:4x4", "1:4@32x8"), strict=False):
            layer.weight.mul_(nm_mask(layer.weight, Pattern.parse(text)))
    return model


def test_compile_without_a_pattern_runs_every_weight_by_its_own() -> None:
    model, x = net(), torch.randn(3, 32)
    fast = sdm.compile(model, mode="infer", backend="eager", kernels={"*": "sparse"})
    assert_same(fast(x), model(x).detach(), tolerance=1e-5)
    explanation = sdm.explain(fast)
    assert [str(row.pattern) for row in explanation.rows] == [
        "2:4",
        "1:8",
        "1:4x4",
        "1:4@32x8",
        "None",
    ]
    assert explanation.rows[4].refusal == "its values satisfy no N:M pattern"
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
