"""Small nets for tests of the guards, and their calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.models.presets import from_diffusers
from tests.oracle import OPTIONS, align, assert_same, hand_masked, oracle_of
from tests.zoo import Call, Family, sample_of

UNET = Family(
    "unet",
    partial(
        from_diffusers,
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (16,),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("UpBlock2D",),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
    ),
    timestep=1,
)
"""Of one level: a guard is no matter of the architecture, and every capture takes a second."""

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
    if isinstance(model, nn.Module):
        align(model)
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
