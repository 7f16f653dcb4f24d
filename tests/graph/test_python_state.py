"""A run is undone: attributes, containers, closures, tensors and random states are put back."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.graph.python_state import PythonState, undo_after
from tests.oracle import OPTIONS, assert_same, oracle_of

X = torch.linspace(-1, 1, 32).reshape(2, 16)


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1


@dataclass
class Held:
    items: list[int] = field(default_factory=lambda: [1])
    table: dict[str, Any] = field(default_factory=dict)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.held = Held()
        self.ordered = OrderedDict(a=1, b=2)
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.queue = deque([1, 2], maxlen=2)
        self.names = {"a"}
        self.slotted = Slotted()
        self.cache: Tensor | None = None
        self.register_buffer("seen", torch.zeros(3))
        self.kept = torch.ones(2)
        self.add = self._make_adder()
        self.partial = functools.partial(self._append, [0])

    @staticmethod
    def _make_adder() -> Any:
        total = 0

        def add() -> int:
            nonlocal total
            total += 1
            return total

        return add

    @staticmethod
    def _append(into: list[int]) -> int:
        into.append(1)
        return len(into)

    def touch(self) -> None:
        self.count += 1
        self.new = "attribute"
        self.held.items.append(2)
        self.held.table["k"] = self.count
        self.ordered.move_to_end("a")
        self.counts["x"] += 1
        self.queue.append(3)
        self.names.add("b")
        self.slotted.value += 1
        self.cache = torch.ones(1)
        self.seen.add_(1)
        self.kept.mul_(3)
        self.add()
        self.partial()
        random.random()
        np.random.random()
        torch.rand(())


def test_run_when_undone_leaves_no_trace() -> None:
    model = Stateful()
    generator = torch.Generator().manual_seed(0)
    given = {"cache": [1]}
    draws = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    expected = torch.rand((), generator=torch.Generator().manual_seed(0))
    with undo_after(model, given, generator):
        model.touch()
        given["cache"].append(2)
        torch.rand((), generator=generator)
        assert model.count == 1
    assert (model.count, model.held.items, model.held.table) == (0, [1], {})
    assert "new" not in vars(model)
    assert list(model.ordered) == ["a", "b"]
    assert (dict(model.counts), list(model.queue), model.names) == ({}, [1, 2], {"a"})
    assert model.slotted.value == 1
    assert model.cache is None
    assert_same(model.seen, torch.zeros(3))
    assert_same(model.kept, torch.ones(2))
    assert model.add() == 1
    assert model.partial() == 2
    assert given == {"cache": [1]}
    assert_same(torch.rand((), generator=generator), expected)
    assert random.getstate() == draws[0]
    assert_same(torch.get_rng_state(), draws[1])
    assert (np.random.get_state()[1] == draws[2]).all()


def test_parameters_when_a_run_is_undone_are_not_touched() -> None:
    model = nn.Linear(2, 2)
    state = PythonState(model)
    with torch.no_grad():
        model.weight.mul_(2)
    changed = model.weight.clone()
    state.restore()
    assert_same(model.weight, changed)


class Cached(nn.Module):
    """Keeps the residual of its middle in Python, and uses the last one at every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.calls = 0
        self.residuals: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.calls += 1
        torch._dynamo.graph_break()
        if self.calls % 2:
            self.residuals = [self.c(self.b(x))]
        return self.d(x + self.residuals[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_cache_when_the_first_call_decides_holds_the_masked_residual(mode: str) -> None:
    student = sdm.compile(Cached(), "2:4", backend="eager", **OPTIONS[mode])
    outs = [student(X), student(X + 1), student(X), student(X - 1)]
    assert student.calls == 4
    student.calls, student.residuals = 0, []
    oracle = oracle_of(student)
    for out, x in zip(outs, (X, X + 1, X, X - 1), strict=True):
        assert_same(out, oracle(x))
    assert sdm.explain(student).broken is not None
