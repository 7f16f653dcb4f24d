"""Forwards and methods that take gradients, step an optimizer or write parameters themselves.

What a first call decides by is undone: it leaves no gradients, and writes parameters once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from tests.compiler.nets import Chain
from tests.oracle import OPTIONS, ROUNDING, assert_same, oracle_of

X = torch.linspace(-1, 1, 48).reshape(3, 16)
orders = pytest.mark.parametrize("called", [True, False], ids=["called", "not called"])


class Trained(Chain):
    """Trains itself, in one way or another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(()), requires_grad=False)

    def backward_of_loss(self, x: Tensor) -> Tensor:
        loss = self.d(self.c(torch.tanh(self.b(self.a(x))))).square().mean()
        loss.backward()
        return loss.detach()

    @torch.enable_grad()
    def with_gradients_on(self, x: Tensor) -> Tensor:
        return self.backward_of_loss(x)

    def by_autograd(self, x: Tensor) -> Tensor:
        loss = self.d(self.c(torch.tanh(self.b(self.a(x))))).square().mean()
        torch.autograd.backward(loss)
        return loss.detach()

    def step(self, x: Tensor) -> Tensor:
        optimizer = torch.optim.SGD([self.a.weight, self.b.weight, self.c.weight], lr=0.1)
        optimizer.zero_grad()
        loss = self.backward_of_loss(x)
        optimizer.step()
        return loss

    def counted(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.count.add_(1)
            self.a.bias.data.mul_(0.5)
            self.d.bias.data = self.d.bias + 1
        return self.d(self.c(torch.tanh(self.b(self.a(x)))))  # type: ignore[no-any-return]


WAYS = ("backward_of_loss", "with_gradients_on", "by_autograd", "step", "counted")


def latent_step(student: nn.Module, way: str) -> tuple[Tensor, nn.Module]:
    """What the method does to a model whose masks are computed by hand (straight-through)."""
    oracle = oracle_of(student)
    for parameter in oracle.parameters():
        parameter.grad = None
    return getattr(oracle, way)(X), oracle


@orders
@pytest.mark.parametrize("way", WAYS)
def test_method_that_trains_does_so_once_and_masked(way: str, called: bool) -> None:
    torch.manual_seed(0)
    student = sdm.compile(Trained(), "2:4", backend="eager")
    twin = copy.deepcopy(student)
    twin(X)
    out, oracle = latent_step(twin, way)
    before = {name: value.clone() for name, value in student.named_parameters()}
    if called:
        student(X)
    assert_same(getattr(student, way)(X), out)
    for name, parameter in oracle.named_parameters():
        ours = student.get_parameter(name)
        assert (ours.grad is None) == (parameter.grad is None)
        if parameter.grad is not None:
            assert_same(ours.grad, parameter.grad)
        if way == "step" and name in ("a.weight", "b.weight", "c.weight"):
            assert_same(ours, before[name] - 0.1 * parameter.grad, tolerance=1e-6)
    if way == "counted":
        assert_same(student.count, torch.ones(()))
        assert_same(student.a.bias, before["a.bias"] / 2)
        assert_same(student.d.bias, before["d.bias"] + 1)
    assert set(sdm.explain(student).masked) == {"b.weight", "c.weight"}


class Counted(Trained):
    def forward(self, x: Tensor) -> Tensor:
        out = self.counted(x)
        return out * 2 if out.sum().item() > 1e9 else out


def test_forward_that_writes_parameters_and_breaks_its_graph_writes_them_once() -> None:
    student = sdm.compile(Counted(), "2:4", backend="eager")
    for calls in (1, 2, 3):
        student(X)
        assert student.count.item() == calls


class Energy(Chain):
    """Its output is the gradient of an energy."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.d(self.c(torch.tanh(self.b(self.a(x))))).square().sum()
        return torch.autograd.grad(energy, x)[0]

    def score(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.d(self.c(torch.tanh(self.b(self.a(x))))).square().sum()
        return torch.autograd.grad(energy, x)[0]


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "forward": lambda model: model(X),
    "score": lambda model: model.score(X),
}


@pytest.mark.parametrize("mode", ["train", "infer", "sparse"])
@pytest.mark.parametrize("first", CALLS)
def test_model_that_is_the_gradient_of_an_energy_runs_masked(first: str, mode: str) -> None:
    torch.manual_seed(0)
    student = sdm.compile(Energy(), "2:4", backend="eager", **OPTIONS[mode])
    for call in (CALLS[first], *CALLS.values()):
        out = call(student)
        assert_same(out, call(oracle_of(student)), tolerance=ROUNDING[mode])
    assert set(sdm.explain(student).masked) >= {"b.weight", "c.weight"}


def test_macs_of_a_forward_that_takes_gradients_are_an_error() -> None:
    with pytest.raises(sdm.CaptureError, match="forward of Energy takes gradients itself"):
        sdm.count_macs(Energy(), X)
