"""Sizes that depend on the data: boolean-indexed tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from tests.oracle import OPTIONS, ROUNDING, assert_same, hand_masked, oracle_of

X = torch.linspace(-1, 1, 64).reshape(4, 16)


class Indexed(nn.Module):
    """Runs its second layer on some of the tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).clone()
        kept = x.sum(-1) > 0
        h[kept] = self.b(h[kept])
        return self.c(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["train", "infer", "sparse"])
def test_indexed_tokens_when_a_size_is_unknown_run_masked(mode: str) -> None:
    student = sdm.compile(Indexed(), "2:4", backend="eager", **OPTIONS[mode])
    for x in (X, -X, torch.cat([X, X])):
        assert_same(student(x), oracle_of(student)(x), tolerance=ROUNDING[mode])
    assert not torch.equal(student(X), hand_masked(student, {})(X))
    assert sdm.explain(student).masked == ("b.weight",)  # c comes after it, through h
    assert sdm.explain(student).broken is None


def test_indexed_tokens_when_kernels_are_measured_run_dense_with_the_reason() -> None:
    fast = sdm.compile(Indexed(), "2:4", mode="infer", backend="eager")
    assert_same(fast(X), oracle_of(fast)(X))
    (choice,) = sdm.explain(fast).choices
    assert choice.kernel == "dense"
    assert choice.reason == "a size of the input of linear depends on the data"


def test_indexed_tokens_when_counted_have_the_macs_of_these_inputs() -> None:
    report = sdm.count_macs(Indexed(), X)
    kept = int((X.sum(-1) > 0).sum())
    assert 0 < kept < 4
    assert report.dense == 16 * 16 * (4 + kept + 4)
    assert report.sparse == 16 * 16 * (4 + 4) + 16 * 16 * kept // 2
    with pytest.raises(sdm.CaptureError, match="depend on the data, so it cannot be counted on"):
        sdm.count_macs(Indexed().to("meta"), X.to("meta"))
    with pytest.raises(sdm.ConfigError, match="sizes in Indexed depend on the data"):
        sdm.topology(Indexed(), X)
