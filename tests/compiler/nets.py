"""Small nets for tests of the guards, and their calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from tests.oracle import OPTIONS, assert_same, hand_masked, oracle_of
from tests.zoo import FAMILIES, Call, Family, sample_of

UNET: Family = next(family for family in FAMILIES if family.name == "unet_condition")
X = torch.linspace(-1, 1, 32).reshape(2, 16)


class Chain(nn.Module):
    """Four layers in a row; the middle ones are pruned."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.d(self.c(torch.relu(self.b(self.a(x)))))
        return out


def compiled_chain(mode: str = "train", **options: Any) -> nn.Module:
    """Returns a compiled Chain with seeded weights."""
    torch.manual_seed(0)
    return sdm.compile(Chain(), "2:4", **{"backend": "eager", **OPTIONS[mode], **options})


def compiled_unet(mode: str = "train", **options: Any) -> nn.Module:
    """Returns a compiled small UNet2DConditionModel."""
    return sdm.compile(UNET.build(), "2:4", **{"backend": "eager", **OPTIONS[mode], **options})


@torch.no_grad()
def run_unet(model: Callable[..., Any], call: Call | None = None) -> Tensor:
    """Returns the prediction of a UNet on fixed inputs."""
    args, kwargs = call or UNET.inputs(UNET.build())
    return sample_of(model(*args, **kwargs))


def assert_masked(student: nn.Module, out: Tensor) -> None:
    """Asserts that ``out`` is what the hand-masked UNet computes, and not the dense one."""
    patterns = {
        name: decision.pattern
        for name, decision in student._sparsedm.decisions.items()
        if decision.pattern is not None
    }
    assert patterns
    assert_same(out, run_unet(hand_masked(UNET.build(), patterns)))
    assert not torch.equal(out, run_unet(UNET.build()))


def assert_chain(student: nn.Module, x: Tensor = X) -> None:
    """Asserts that a compiled Chain runs as its oracle."""
    out = student(x)
    assert_same(out, oracle_of(student)(x))
