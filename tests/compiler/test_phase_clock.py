"""The seconds of first calls, by phase."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler import compile_blocks
from sparsedm_compiler.compiler import lower as lowering
from sparsedm_compiler.compiler.folded_weights import FoldedWeights
from sparsedm_compiler.compiler.inner_backend import compile_graph
from sparsedm_compiler.compiler.phase_clock import PHASES, PhaseClock


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def slowed(function: Any, seconds: float) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return run


def test_explain_of_a_called_model_tells_what_each_phase_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lowering, "select_kernel", slowed(lowering.select_kernel, 0.11))
    monkeypatch.setattr(FoldedWeights, "fold", slowed(FoldedWeights.fold, 0.22))
    monkeypatch.setattr(compile_blocks, "compile_graph", slowed(compile_graph, 0.33))
    student = sdm.compile(Net(), "2:4", mode="infer", backend="eager", kernels={"*": "dense"})
    assert set(sdm.explain(student).timings.values()) == {0.0}
    with torch.no_grad():
        student(torch.randn(2, 16))
        timings = dict(sdm.explain(student).timings)
        student(torch.randn(2, 16))
    assert tuple(timings) == PHASES
    for phase, slept in zip(PHASES, (0.11, 0.22, 0.33), strict=True):
        assert timings[phase] >= slept
    assert sdm.explain(student).timings == timings  # the second call compiled nothing
    assert sum(timings.values()) < 5.0
    assert "first calls spent" not in str(sdm.explain(student))
    student._sparsedm.clock.seconds["search"] = 61.25
    assert "first calls spent: search 61.2 s, pack 0.2 s" in str(sdm.explain(student))
    assert sdm.explain(copy.deepcopy(student)).timings == dict.fromkeys(PHASES, 0.0)


def test_phase_clock_counts_a_phase_that_fails() -> None:
    clock = PhaseClock()

    def fail() -> None:
        with clock.measure("pack"):
            time.sleep(0.01)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert clock.seconds["pack"] >= 0.01
