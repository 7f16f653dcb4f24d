"""``f(x) -> f(pad(x))[:tokens]``: pads tokens once, and computes on padded rows between calls.

A kernel that takes tokens in multiples only would pad its input in every call. Here x is padded
once, and its rows of zeros, soon of other numbers, are carried along through every op that acts on
each row alone, norms, activations, residual sums, up to where rows meet: in attention.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...backends.registry import find_token_multiples
from ...graph.effects import may_write_in_place
from ...graph.flat_graph import get_example_value
from ..planned_weight import Plan

_LEAST_MULTIPLE = 16
"""Tokens are padded to a multiple of this, or of more where an op wants more."""
_NORMS = {F.layer_norm, F.rms_norm, torch.rms_norm}
_POINTWISE = {
    *(F.gelu, F.silu, F.relu, F.mish, F.hardswish, torch.relu, torch.tanh, torch.sigmoid),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.div),
    *("float", "half", "bfloat16", "contiguous", "relu", "tanh", "sigmoid"),
}


def pad_tokens(gm: fx.GraphModule, plan: Plan) -> int:
    """Rewrites each call that would pad its input; returns how many it rewrote.

    The ops are those of ``token_ops`` that a kernel family declares. Only for numbers of tokens
    known at compile time, and where nothing is changed in place. The first ``tokens`` rows of every
    value stay as they are.
    """
    multiples = find_token_multiples()
    nodes = list(gm.graph.nodes)
    calls = {node for node in nodes if _would_pad(node, multiples)}
    if not calls or any(map(may_write_in_place, nodes)):
        return 0
    multiple = math.lcm(_LEAST_MULTIPLE, *multiples.values())
    row_wise = _find_row_wise(calls)
    padded: dict[fx.Node, fx.Node] = {}  # by the nodes they stand for
    carried = []
    for node in nodes:
        rows: list[Any] | None = None
        if node in calls:
            rows = [node.args[0]]
        elif node in row_wise:
            rows = _find_row_operands(node)
        if rows and (node in calls or any(row in padded for row in rows)):
            _carry(node, rows, padded, multiple)
            carried.append(node)
    for node in reversed(carried):
        _cut(node, padded[node])
    return len(calls)


def _would_pad(node: fx.Node, multiples: Mapping[Any, int]) -> bool:
    if node.op != "call_function" or node.target not in multiples:
        return False
    tokens = _count_tokens(node)
    return bool(tokens) and tokens % multiples[node.target] != 0


def _find_row_wise(calls: set[fx.Node]) -> set[fx.Node]:
    """Returns the nodes that act on each row alone on a way to one of the calls."""
    row_wise: set[fx.Node] = set()
    pending: list[Any] = [call.args[0] for call in calls]
    while pending:
        node = pending.pop()
        rows = _find_row_operands(node)
        if node not in row_wise and rows is not None:
            row_wise.add(node)
            pending += rows
    return row_wise


def _find_row_operands(node: fx.Node) -> list[fx.Node] | None:
    """Returns the operands with the rows of a node that acts on each row alone; else None.

    All else that it reads is numbers, or one vector for all rows.
    """
    if (
        not _count_tokens(node)
        or not get_example_value(node).is_contiguous()
        or not _acts_by_row(node)
    ):
        return None
    rows = []
    for operand in node.all_input_nodes:
        value = get_example_value(operand)
        if not isinstance(value, Tensor):
            return None
        if value.dim() > 1:
            if value.shape[:-1] != get_example_value(node).shape[:-1]:
                return None
            rows.append(operand)
    return rows


def _acts_by_row(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    target = node.target
    args: tuple[Any, ...] = (*node.args, *node.kwargs.values())
    if target in _NORMS:
        return len(args[1]) == 1
    if target is F.dropout:
        return args[2:3] == (False,)
    if target == "to":
        return isinstance(args[1], torch.dtype)
    if target is torch.cat:
        return args[1:] == (-1,)
    return target in _POINTWISE


def _carry(node: fx.Node, rows: list[Any], padded: dict[fx.Node, fx.Node], multiple: int) -> None:
    """Puts the node's double on padded rows in front of it; ``rows``: its operands to replace."""
    with node.graph.inserting_before(node):
        doubles = {row: padded.get(row) or _pad(row, multiple) for row in rows}
        padded.update(doubles)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: doubles.get(arg, arg))
        double = node.graph.create_node(node.op, node.target, args, kwargs)
    shape = get_example_value(doubles[rows[0]]).shape[0], get_example_value(node).shape[-1]
    _set_value(double, get_example_value(node).new_empty(shape))
    padded[node] = double


def _pad(node: fx.Node, multiple: int) -> fx.Node:
    """Returns [tokens, C] with rows of zeros behind, put at the insertion point."""
    graph, value = node.graph, get_example_value(node)
    tokens, width = _count_tokens(node), value.shape[-1]
    flat = node
    if value.dim() != 2:
        flat = graph.call_method("reshape", (node, (tokens, width)))
        _set_value(flat, value.new_empty(tokens, width))
    missing = -tokens % multiple
    rows = graph.call_function(F.pad, (flat, (0, 0, 0, missing)))
    _set_value(rows, value.new_empty(tokens + missing, width))
    return rows


def _cut(node: fx.Node, double: fx.Node) -> None:
    """Lets the remaining readers of the node read the first rows of its double."""
    if node.users:
        graph, value = node.graph, get_example_value(node)
        with graph.inserting_before(node):
            first = graph.call_function(operator.getitem, (double, slice(0, _count_tokens(node))))
            _set_value(first, get_example_value(double)[: _count_tokens(node)])
            shaped = graph.call_method("reshape", (first, tuple(value.shape)))
        shaped.meta = dict(node.meta)
        node.replace_all_uses_with(shaped)
    node.graph.erase_node(node)


def _set_value(node: fx.Node, value: Tensor) -> None:
    node.meta["example_value"] = value


def _count_tokens(node: fx.Node) -> int:
    """Returns the rows of a node's value [..., C]; 0 where they are unknown, or there are none."""
    value = get_example_value(node)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return 0
    known = all(isinstance(size, int) for size in value.shape)
    return value.numel() // value.shape[-1] if known and value.shape[-1] else 0
