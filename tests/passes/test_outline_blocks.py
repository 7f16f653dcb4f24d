"""One sub-graph stands for all blocks that are equal, and computes what they did."""

from __future__ import annotations

import copy

import torch
from torch import fx

from sparsedm_compiler.graph.capture import capture
from sparsedm_compiler.graph.flat_graph import flatten
from sparsedm_compiler.passes import find_repeated_blocks, outline_blocks
from tests.oracle import assert_same
from tests.passes.repeated import Stack, stack_inputs


def targets(gm: fx.GraphModule) -> list[object]:
    """What the graph calls, with all that its sub-graphs do in their place."""
    return [op.node.target for op in flatten(gm) if op.node.op in ("call_function", "call_method")]


def test_outline_blocks_keeps_every_op_and_every_number() -> None:
    model, inputs = Stack(5, changes={1: torch.sin, 3: torch.sin}), stack_inputs()
    graph = capture(model, *inputs)
    assert graph is not None
    gm, before = graph.gm, targets(graph.gm)
    parameters = dict(model.named_parameters())
    nodes = gm.graph.find_nodes(op="placeholder")
    values = [parameters[graph.names[node][0]] if node in graph.names else None for node in nodes]
    left = iter(inputs)
    arguments = [next(left) if value is None else value for value in values]
    with torch.no_grad():
        expected = copy.deepcopy(gm)(*arguments)
        assert outline_blocks(gm, find_repeated_blocks(gm)) == 5
        assert_same(gm(*arguments)[0], expected[0])
    assert targets(gm) == before
    bodies = {name for name, _ in gm.named_children()}
    assert bodies == {"repeated_block_0", "repeated_block_1"}
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
    assert [node.args[1] for node in calls] == [f"repeated_block_{i % 2}" for i in range(5)]


def test_outline_blocks_without_groups_changes_nothing() -> None:
    graph = capture(Stack(1), *stack_inputs())
    assert graph is not None
    code = graph.gm.code
    assert outline_blocks(graph.gm, find_repeated_blocks(graph.gm)) == 0
    assert graph.gm.code == code
