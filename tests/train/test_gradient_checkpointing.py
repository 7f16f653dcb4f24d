"""Gradient checkpointing: the same numbers, fewer activations, no mask computed twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.patterns import NM
from sparsedm_compiler.train.find_blocks import find_blocks
from sparsedm_compiler.train.gradient_checkpointing import checkpointing_gradients, is_checkpointing
from tests.train.cases import data, short, student_of, teacher, weights


class Block(nn.Module):
    """A block with dropout, called by keyword as well."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        out: Tensor = x + self.drop(self.outer(torch.relu(gain * self.inner(x))))
        return out


class Net(nn.Module):
    """A model without checkpointing of its own."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, width)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, gain=2.0)
        out: Tensor = self.last(x)
        return out


def compute_gradients(model: nn.Module, *call: Tensor) -> tuple[list[Tensor], int]:
    """The gradients of one call with the same dropout, and the bytes kept for the backward."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    torch.manual_seed(1)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*call).square().mean()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    size = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], size


def make_call() -> tuple[Tensor, ...]:
    """Inputs of one call, with more values than the weights have."""
    torch.manual_seed(2)
    return torch.randn(64, 16), torch.zeros(64)


def test_student_when_checkpointed_has_the_same_gradients_and_keeps_less() -> None:
    student = sdm.compile(Net(), "2:4", backend="eager").train()
    call = make_call()
    plain, size = compute_gradients(student, *call)
    with checkpointing_gradients(student, True):
        again, less = compute_gradients(student, *call)
        twin, _ = compute_gradients(copy.deepcopy(student), *call)
    after, same = compute_gradients(student, *call)
    assert all(map(torch.equal, plain, again))
    assert all(map(torch.equal, plain, twin))
    assert all(map(torch.equal, plain, after))
    assert less < 0.8 * size
    assert same == size
    assert not is_checkpointing(student)


def test_masks_of_a_checkpointed_student_are_computed_once(monkeypatch: Any) -> None:
    student = sdm.compile(Net(), "2:4", backend="eager").train()
    call, computed = make_call(), []
    own = NM.compute_mask

    def compute_mask(self: NM, weight: Tensor) -> Tensor:
        computed.append(weight.shape)
        return own(self, weight)

    monkeypatch.setattr(NM, "compute_mask", compute_mask)
    with checkpointing_gradients(student, True):
        compute_gradients(student, *call)
        computed.clear()
        compute_gradients(student, *call)
    assert len(computed) == len(sdm.masked_parameters(student)) == 6


@pytest.mark.parametrize("method", ["sparsedm", "dense"])
def test_finetune_with_gradient_checkpointing_equals_one_without(method: str) -> None:
    plain, one = short(method, images=32)
    less, two = short(method, images=32, gradient_checkpointing=True)
    assert plain.losses == less.losses
    assert all(map(torch.equal, weights(one), weights(two)))
    assert less.ema is not None
    assert not is_checkpointing(two)
    assert not is_checkpointing(less.ema)


def test_finetune_of_a_model_that_checkpoints_already_leaves_it_so() -> None:
    model = student_of(teacher())
    model.enable_gradient_checkpointing()
    result = sdm.finetune(
        model, None, data(), images=8, batch_size=4, gradient_checkpointing=True, progress=False
    )
    assert is_checkpointing(model)
    assert result.ema is not None
    assert is_checkpointing(result.ema)


def test_blocks_are_the_outermost_members_of_lists_of_their_like() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Net(), nn.ReLU()), nn.Linear(2, 2))
    assert [type(block) for block in find_blocks(net)] == [Block] * 3
    assert [type(block) for block in find_blocks(nn.Sequential(Net(), Net()))] == [Net] * 2


def test_model_without_blocks_is_refused() -> None:
    model = nn.Conv2d(1, 1, 1)
    with pytest.raises(sdm.ConfigError, match="Conv2d has no gradient checkpointing of its own"):
        sdm.finetune(model, None, data()[0], method="dense", images=8, gradient_checkpointing=True)
