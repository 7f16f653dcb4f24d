"""``ops of block i -> invoke_subgraph(block, weights of block i, x)``: one sub-graph for them all.

Inductor compiles a sub-graph once, however often it is invoked, and calls it as a function in the
code of the whole graph: torch's regional compilation, without any change to the model. Not one of
the planned rewrites: it comes after their verification, when packed weights have their layouts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx, nn

from ..graph.flat_graph import get_example_value
from .analysis.find_repeated_blocks import Block, BlockGroup


def outline_blocks(gm: fx.GraphModule, groups: Sequence[BlockGroup]) -> int:
    """Replaces every block by a call of its group's sub-graph.

    Args:
        gm: The graph; edited in place.
        groups: Its repeated blocks, from ``find_repeated_blocks``.

    Returns:
        The number of blocks that were replaced.
    """
    bodies = [extract_graph(group[0]) for group in groups]
    replaced: dict[fx.Node, fx.Node] = {}
    for group, body in zip(groups, bodies, strict=True):
        name = _find_free_name(gm)
        gm.add_submodule(name, body)
        for block in group:
            _replace(gm.graph, block, name, replaced)
    if groups:
        gm.recompile()
        gm.graph.lint()
    return sum(map(len, groups))


def _find_free_name(gm: fx.GraphModule) -> str:
    taken, number = dict(gm.named_children()), 0
    while f"repeated_block_{number}" in taken:
        number += 1
    return f"repeated_block_{number}"


def extract_graph(block: Block) -> fx.GraphModule:
    """Copies a block into a graph of its own.

    Args:
        block: The block, which stays as it is.

    Returns:
        The graph, which takes ``block.inputs`` and returns a tuple of ``block.outputs``.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(block.inputs):
        copies[node] = graph.placeholder(f"input_{number}")
        copies[node].meta["example_value"] = get_example_value(node)
    for node in block.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in block.outputs))
    return fx.GraphModule(nn.Module(), graph)


def _replace(graph: fx.Graph, block: Block, name: str, replaced: dict[fx.Node, fx.Node]) -> None:
    """Puts a call of the sub-graph of that name into the place of a block.

    ``replaced``: what stands for the outputs of blocks that were replaced before; extended.
    """
    inputs = [replaced.get(node, node) for node in block.inputs]
    with graph.inserting_after(block.nodes[-1]):
        body = graph.get_attr(name)
    with graph.inserting_after(body):
        call = last = graph.call_function(
            torch.ops.higher_order.invoke_subgraph, (body, name, *inputs)
        )
    call.meta = {"example_value": tuple(get_example_value(node) for node in block.outputs)}
    for number, output in enumerate(block.outputs):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, number))
        last.meta = dict(output.meta)
        output.replace_all_uses_with(last)
        replaced[output] = last
    for node in reversed(block.nodes):
        graph.erase_node(node)
