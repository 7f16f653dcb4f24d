"""graph -> BlockGroup: runs of nodes that are equal but for the values that they read.

A run is all that one call of a module computes. Equal are runs with the same ops in the same order,
the same constants, and inputs and results of the same shapes, strides and dtypes: the blocks of a
transformer, whose weights differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.effects import may_draw, may_write_in_place
from ...graph.flat_graph import get_example_value

LEAST_NODES = 8
LEAST_WEIGHTS = 2
"""A block has so many nodes and reads so many inputs of the graph; one layer is not worth a call.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One run of nodes that can become a sub-graph.

    Attributes:
        nodes: The run, in the order of the graph.
        inputs: The nodes outside of it that it reads, in the order of their first reading.
        outputs: Those of its nodes that others read.
        module: The class of the module that it is a call of.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    module: str


BlockGroup = tuple[Block, ...]
"""Blocks that one sub-graph can stand for; at least two."""


def find_repeated_blocks(gm: fx.GraphModule) -> tuple[BlockGroup, ...]:
    """Finds the outermost modules of which a graph holds several equal calls.

    Left alone are modules that draw random numbers, write in place, hold sub-graphs of their own
    (gradient checkpointing), change the state of autograd or autocast, or return a view of what
    they were given; and all of a graph with symbolic shapes.

    Args:
        gm: A graph of TorchDynamo; not edited.

    Returns:
        The groups, in the order of the graph; blocks of all groups are disjoint.
    """
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    if any(_is_symbolic(get_example_value(node)) for node in gm.graph.nodes):
        return ()
    groups: list[BlockGroup] = []
    runs, depth = [nodes], 0
    while runs:
        calls = [run for outer in runs for run in _split_by_module(outer, depth)]
        equal: dict[Hashable, list[Block]] = {}
        runs = []
        for index, run in enumerate(calls):
            block = _describe_block(run, depth)
            key: Hashable = index if block is None else _describe_signature(block)
            if block is None:
                runs.append(run)
            else:
                equal.setdefault(key, []).append(block)
        for blocks in equal.values():
            if len(blocks) > 1:
                groups.append(tuple(blocks))
            else:
                runs.append(list(blocks[0].nodes))
        depth += 1
    return tuple(groups)


def _list_modules(node: fx.Node) -> list[tuple[str, Any]]:
    """Returns (path, class) of the modules around a node, from the outermost on."""
    return list(node.meta.get("nn_module_stack", {}).values())


def _split_by_module(nodes: Sequence[fx.Node], depth: int) -> list[list[fx.Node]]:
    """Returns the runs of nodes that lie in one module at that depth.

    Nodes that know of no module, as rewrites insert them, belong to what is around them.
    """
    runs: list[list[fx.Node]] = []
    unknown: list[fx.Node] = []
    path = None
    for node in nodes:
        modules = _list_modules(node)
        if not modules:
            unknown.append(node)
            continue
        here = modules[depth][0] if len(modules) > depth else None
        if here is not None and here == path:
            runs[-1] += [*unknown, node]
        elif here is not None:
            runs.append([node])
        path, unknown = here, []
    return runs


def _describe_block(nodes: Sequence[fx.Node], depth: int) -> Block | None:
    """Returns the block that nodes form; None where they cannot be a sub-graph, or are too few."""
    if len(nodes) < LEAST_NODES or any(map(_is_unfit, nodes)):
        return None
    module = _list_modules(nodes[0])[depth][1]
    name = module if isinstance(module, str) else module.__name__
    block = make_block(nodes, name)
    weights = [x for x in block.inputs if x.op == "placeholder"]
    fits = len(weights) >= LEAST_WEIGHTS and block.outputs
    return block if fits and not _share_memory(block.inputs, block.outputs) else None


def make_block(nodes: Sequence[fx.Node], module: str = "") -> Block:
    """Makes a block of neighbouring nodes.

    Args:
        nodes: The nodes, in the order of the graph.
        module: The class of the module that they are a call of; "" for none.

    Returns:
        The nodes with all that goes into them and out of them.
    """
    inside = set(nodes)
    inputs = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in inside)
    outputs = (node for node in nodes if any(user not in inside for user in node.users))
    return Block(tuple(nodes), tuple(inputs), tuple(outputs), module)


def _is_unfit(node: fx.Node) -> bool:
    """Returns whether a node may not be part of a sub-graph."""
    if node.op not in ("call_function", "call_method"):
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if may_write_in_place(node) or may_draw(node):
        return True
    return get_example_value(node) is None  # autocast, grad mode, assertions


def _share_memory(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> bool:
    """Returns whether an output is no tensor, or lies in the memory of an input or of another."""
    values = [get_example_value(node) for node in outputs]
    if not all(isinstance(value, Tensor) for value in values):
        return True
    memory = [value.untyped_storage()._cdata for value in values]
    input_memory = {
        value.untyped_storage()._cdata
        for value in map(get_example_value, inputs)
        if isinstance(value, Tensor)
    }
    return len(set(memory)) < len(memory) or not input_memory.isdisjoint(memory)


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, Tensor):
        return any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride()))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _describe_signature(block: Block) -> Hashable:
    """Returns all that has to be equal for one sub-graph to stand for two blocks."""
    places = {node: ("input", number) for number, node in enumerate(block.inputs)}
    places |= {node: ("node", number) for number, node in enumerate(block.nodes)}
    rows = []
    for node in block.nodes:
        arguments = _replace_nodes((node.args, node.kwargs), places)
        rows.append((node.op, node.target, repr(arguments), _describe_value(node)))
    inputs = tuple(map(_describe_value, block.inputs))
    return block.module, tuple(rows), inputs, tuple(places[node] for node in block.outputs)


def _replace_nodes(tree: Any, places: Mapping[fx.Node, tuple[str, int]]) -> Any:
    """Returns nested arguments with the place of each node instead of the node."""
    if isinstance(tree, (tuple, list)):
        return tuple(_replace_nodes(part, places) for part in tree)
    if isinstance(tree, Mapping):
        return {key: _replace_nodes(part, places) for key, part in tree.items()}
    if isinstance(tree, slice):
        return "slice", _replace_nodes((tree.start, tree.stop, tree.step), places)
    return places[tree] if isinstance(tree, fx.Node) else tree


def _describe_value(node: fx.Node) -> Hashable:
    value = get_example_value(node)
    parts: Iterable[Any] = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(_describe_tensor(part) for part in parts)


def _describe_tensor(value: Any) -> Hashable:
    if not isinstance(value, Tensor):
        return repr(value)
    layout = tuple(value.shape), tuple(value.stride())
    return *layout, value.dtype, value.device, value.requires_grad, type(value).__name__
