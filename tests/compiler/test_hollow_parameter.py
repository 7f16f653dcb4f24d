"""In-place edits of a finalized weight, which holds no values: they find the masked dense ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler.hollow_parameter import is_hollow
from tests.compiler.nets import Chain, X
from tests.oracle import OPTIONS, ROUNDING, assert_same

EDITS: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda w: w.mul_(2),
    "imul": lambda w: w.__imul__(2),
    "idiv": lambda w: w.__itruediv__(2),
    "copy_": lambda w: w.copy_(torch.ones(16, 16)),
    "lerp_": lambda w: w.lerp_(torch.ones(16, 16), 0.5),
    "setitem": lambda w: w.__setitem__(0, 0.0),
    "init": lambda w: nn.init.constant_(w, 0.5),
    "data": lambda w: w.data.mul_(2),
}


@torch.no_grad()
@pytest.mark.parametrize("edit", EDITS)
def test_finalized_weight_when_edited_is_the_edited_masked_weight(edit: str) -> None:
    torch.manual_seed(0)
    fast = sdm.compile(Chain(), "2:4", finalize=True, backend="eager", **OPTIONS["sparse"])
    fast(X)
    fast(X)
    assert is_hollow(fast.b.weight)
    values = nn.Parameter(fast.state_dict()["b.weight"].clone())
    EDITS[edit](fast.b.weight)
    EDITS[edit](values)
    assert_same(fast.b.weight, values)
    plain = Chain()
    plain.load_state_dict(fast.state_dict())
    assert_same(fast(X), plain(X), tolerance=ROUNDING["sparse"])
    assert not fast(X).isnan().any()


@torch.no_grad()
def test_finalized_weight_when_read_or_asked_of_its_kind_stays_without_values() -> None:
    fast = sdm.compile(Chain(), "2:4", finalize=True, backend="eager", **OPTIONS["sparse"])
    fast(X)
    fast(X)
    weight = fast.b.weight
    assert is_hollow(weight)
    weight.requires_grad_(False)
    assert (weight.shape, weight.dtype, weight.numel()) == ((16, 16), torch.float32, 256)
    torch.zeros(16, 16).copy_(weight)
    assert is_hollow(weight)
