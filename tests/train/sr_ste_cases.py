"""A student, its SR-STE step by hand, and numbers of which every sum is exact.

Weights, inputs and lambda are small multiples of powers of two: the order of additions cannot hide
an error, and tests compare to the bit.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

import sparsedm_compiler as sdm
from tests.oracle import assert_same, brute_mask

LAM = 2.0**-6
LR = 0.5
PATTERN = "2:4"
FORMS = ("paper", "decoupled")
Grads = dict[str, Tensor]


class Net(nn.Module):
    """First and last stay dense; ``middle`` is pruned, and used twice if asked."""

    def __init__(self, *, twice: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.middle = nn.Linear(8, 8)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        return self.last(self.middle(x) if self.twice else x)


def dyadic(*shape: int, seed: int, bound: int = 4) -> Tensor:
    """Multiples of 1/4 in [-bound/4, bound/4]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-bound, bound + 1, shape, generator=generator) / 4


def net(**kwargs: Any) -> Net:
    model = Net(**kwargs)
    with torch.no_grad():
        for seed, weight in enumerate(model.parameters()):
            weight.copy_(dyadic(*weight.shape, seed=seed))
    return model


def batch(seed: int = 100, size: int = 2) -> Tensor:
    return dyadic(size, 4, seed=seed)


def student_of(model: Net) -> Net:
    student = sdm.compile(model, PATTERN, backend="eager")
    student(batch())  # the capture finds the masked weights
    assert list(sdm.masked_parameters(student)) == ["middle.weight"]
    return student


def ste_grads(model: nn.Module, *inputs: Tensor) -> Grads:
    """Gradients of the masked model by hand: those of a dense copy with masked weights."""
    oracle = copy.deepcopy(model)
    for key in ("forward", "_sparsedm"):
        oracle.__dict__.pop(key, None)
    with torch.no_grad():
        weight = oracle.get_parameter("middle.weight")
        weight.mul_(brute_mask(weight, PATTERN))
    for x in inputs:
        oracle(x).sum().backward()
    return {name: value.grad for name, value in oracle.named_parameters() if value.grad is not None}


def term_of(weight: Tensor, lam: float = LAM) -> Tensor:
    """``lam (1 - m) W``."""
    return lam * (~brute_mask(weight, PATTERN)) * weight.detach()


def sgd(model: nn.Module, **kwargs: Any) -> SGD:
    return SGD(model.parameters(), lr=LR, **kwargs)


def expected_step(model: nn.Module, grads: Grads, lam: float = LAM) -> Grads:
    """Parameters after SGD on ``g + lam (1 - m) W``; under SGD both forms are the same."""
    out = {}
    for name, value in model.named_parameters():
        grad = grads[name]
        if name == "middle.weight":
            grad = grad + term_of(value, lam)
        out[name] = value.detach() - LR * grad
    return out


def assert_stepped(student: nn.Module, expected: Grads) -> None:
    assert {name for name, _ in student.named_parameters()} == {*expected}
    for name, value in student.named_parameters():
        assert_same(value.detach(), expected[name])
