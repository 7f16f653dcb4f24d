"""A graph cut at its repeated blocks: each distinct piece is compiled once, and Python calls them.

For training. There a sub-graph inside one graph (``outline_blocks``) will not do: torch 2.13 fails
where its calls meet gradients of different strides. And Inductor's gradients of a DiT block are
wrong on a CPU, off by a hundredth, where its input is a transposed view, as patches are after their
embedding: so values are laid out in rows before every piece, which costs a copy at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..config import Backend
from ..graph.flat_graph import get_example_value
from ..passes import Block, BlockGroup, extract_graph, make_block
from .inner_backend import compile_graph


@dataclass(frozen=True, slots=True)
class _Step:
    """One call of a piece: the numbers of the values that it reads and of those that it gives.

    ``settled``: which of those that it reads are laid out in rows first.
    """

    run: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    settled: tuple[bool, ...]


class SplitGraph:
    """Runs the pieces of a graph in their order."""

    def __init__(self, steps: Sequence[_Step], size: int, output: Callable[..., Any]) -> None:
        self._steps = tuple(steps)
        self._size = size
        self._output = output

    def __call__(self, *inputs: Any) -> Any:
        values = [*inputs, *[None] * (self._size - len(inputs))]
        for step in self._steps:
            operands = [
                lay_out(values[number]) if settled else values[number]
                for number, settled in zip(step.reads, step.settled, strict=True)
            ]
            results = step.run(*operands)
            for number, result in zip(step.writes, results, strict=True):
                values[number] = result
        return self._output(values)


def compile_split(
    gm: fx.GraphModule, groups: Sequence[BlockGroup], backend: Backend
) -> SplitGraph | None:
    """Compiles a graph piece by piece; None where something but tensors passes between pieces.

    Args:
        gm: A captured graph, rewritten; not edited.
        groups: Its repeated blocks.
        backend: What compiles the pieces.
    """
    pieces = _cut(gm, groups)
    if not all(_is_whole(piece) for piece in pieces):
        return None
    numbers = {node: number for number, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    for piece in pieces:
        for node in piece.outputs:
            numbers[node] = len(numbers)
    leaders = {block: group[0] for group in groups for block in group}
    compiled: dict[Block, Callable[..., Any]] = {}
    steps = []
    for piece in pieces:
        leader = leaders.get(piece, piece)
        settled = tuple(node.op != "placeholder" for node in piece.inputs)
        if leader not in compiled:
            compiled[leader] = _compile(leader, backend)
        reads, writes = (tuple(numbers[x] for x in ends) for ends in (piece.inputs, piece.outputs))
        steps.append(_Step(compiled[leader], reads, writes, settled))
    return SplitGraph(steps, len(numbers), _bind_output(gm, numbers))


def _compile(piece: Block, backend: Backend) -> Callable[..., Any]:
    """Returns what runs a piece, for values that are laid out in rows."""
    graph = extract_graph(piece)
    inputs = []
    placeholders = graph.graph.find_nodes(op="placeholder")
    for node, placeholder in zip(piece.inputs, placeholders, strict=True):
        value = get_example_value(node)
        inputs.append(value if node.op == "placeholder" else lay_out(value))
        placeholder.meta["example_value"] = inputs[-1]
    return compile_graph(graph, inputs, backend)


def lay_out(x: Tensor) -> Tensor:
    """Returns the tensor contiguous, or channels_last if it is that."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _cut(gm: fx.GraphModule, groups: Sequence[BlockGroup]) -> list[Block]:
    """Returns the blocks, and what lies between them, in the order of the graph."""
    blocks = {block.nodes[0]: block for group in groups for block in group}
    inside = {node for block in blocks.values() for node in block.nodes}
    pieces: list[Block] = []
    between: list[fx.Node] = []
    for node in gm.graph.nodes:
        if (node in blocks or node.op == "output") and between:
            pieces.append(make_block(between))
            between = []
        if node in blocks:
            pieces.append(blocks[node])
        elif node not in inside and node.op not in ("placeholder", "output"):
            between.append(node)
    return pieces


def _is_whole(piece: Block) -> bool:
    """Returns whether a piece can be compiled on its own."""
    values = [get_example_value(node) for node in (*piece.inputs, *piece.outputs)]
    known = all(get_example_value(node) is not None for node in piece.nodes)
    return known and all(isinstance(value, Tensor) for value in values)


def _bind_output(gm: fx.GraphModule, numbers: Mapping[fx.Node, int]) -> Callable[..., Any]:
    """Returns a function from all values to what the graph returns."""
    (output,) = gm.graph.find_nodes(op="output")

    def pick(values: Sequence[Any]) -> Any:
        return fx.map_arg(output.args[0], lambda node: values[numbers[node]])

    return pick
