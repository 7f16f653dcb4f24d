"""Which calls of modules are equal, and which may become sub-graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsedm_compiler.graph.capture import capture
from sparsedm_compiler.passes import BlockGroup, find_repeated_blocks
from tests.passes.repeated import Stack, stack_inputs


def find_groups(model: nn.Module, *args: Any) -> tuple[BlockGroup, ...]:
    graph = capture(model, *(args or stack_inputs()))
    assert graph is not None
    return find_repeated_blocks(graph.gm)


def test_find_repeated_blocks_of_a_stack_finds_its_blocks() -> None:
    (group,) = find_groups(Stack(4))
    assert [block.module for block in group] == ["Block"] * 4
    assert len({len(block.nodes) for block in group}) == 1
    assert [len(block.outputs) for block in group] == [1] * 4
    first, second, *_ = group
    assert second.inputs[0] is first.outputs[0]
    covered = [node for block in group for node in block.nodes]
    assert len(covered) == len(set(covered))


def shift(x: Tensor) -> Tensor:
    return x + 1


def test_find_repeated_blocks_with_blocks_of_two_kinds_finds_two_groups() -> None:
    groups = find_groups(Stack(5, changes={1: shift, 3: shift}))
    assert [len(group) for group in groups] == [3, 2]


def stop_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.sin()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: F.dropout(x, 0.5, True),
        lambda x: x + torch.rand_like(x),
        lambda x: x.clone().add_(1),
        lambda x: F.relu(x + 1, inplace=True),
        lambda x: checkpoint(torch.sin, x, use_reentrant=False),
        stop_gradients,
    ],
    ids=["dropout", "rand", "add_", "inplace", "checkpoint", "no_grad"],
)
def test_find_repeated_blocks_leaves_blocks_with_side_effects_alone(
    change: Callable[[Tensor], Tensor],
) -> None:
    (group,) = find_groups(Stack(4, changes={0: change, 1: change}))
    assert len(group) == 2  # the last two


@pytest.mark.parametrize(
    "change", [lambda x: F.dropout(x, 0.5, False), lambda x: F.dropout(x, 0.0, True)]
)
def test_find_repeated_blocks_takes_dropout_that_drops_nothing(
    change: Callable[[Tensor], Tensor],
) -> None:
    (group,) = find_groups(Stack(3, changes=dict.fromkeys(range(3), change)))
    assert len(group) == 3


def test_find_repeated_blocks_tells_constants_and_shapes_apart() -> None:
    assert find_groups(Stack(2, changes={0: lambda x: x * 2, 1: lambda x: x * 3})) == ()
    assert find_groups(Stack(2, changes={0: lambda x: x[:, :8]})) == ()


def test_find_repeated_blocks_leaves_a_block_that_returns_a_view_alone() -> None:
    class Pass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList(View() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for view in self.stack:
                x = view(x)
            return x.sin()

    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(F.gelu(self.a(x).sin().cos().sin().cos())).sum()
            return x.view(4, 8) if y.shape == () else y

    assert find_groups(Pass(), torch.randn(4, 8)) == ()


def test_find_repeated_blocks_of_a_dynamic_graph_finds_none() -> None:
    graphs: list[Any] = []

    def keep(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(Stack(), backend=keep, dynamic=True)(*stack_inputs())
    assert find_repeated_blocks(graphs[0]) == ()
