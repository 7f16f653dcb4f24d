"""``f(x) -> f(pad(x))[:tokens]``, with what lies between two such calls done on padded rows.

A kernel that takes tokens in multiples only would pad its input in every call. Here x is padded
once, and its rows of zeros, soon of other numbers, are carried along through all that acts on each
row alone, norms, activations, residual sums, up to where rows meet: in attention, and in kernels
that quantize all rows by one scale.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...backends.cusparselt.ops import TOKENS, semi_linear
from ...graph.flat_graph import get_example_value
from ..planned_weight import Plan

MULTIPLES = {semi_linear: TOKENS}
"""Calls (x, ...) on the rows of x, and of what number they want a multiple of them."""
_PADDED = 16
"""To a multiple of this, which serves all of them."""
_NORMS = {F.layer_norm, F.rms_norm}
_POINTWISE = {
    *(F.gelu, F.silu, F.relu, F.mish, F.hardswish, torch.relu, torch.tanh, torch.sigmoid),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.div),
    *("float", "half", "bfloat16", "contiguous", "relu", "tanh", "sigmoid"),
}
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "setitem"}


def pad_tokens(gm: fx.GraphModule, plan: Plan) -> int:
    """Rewrite each call that would pad its input; how many.

    Only for numbers of tokens known now, and where nothing is changed in place. The first
    ``tokens`` rows of everything are what they were.
    """
    nodes = list(gm.graph.nodes)
    calls = {node for node in nodes if _would_pad(node)}
    if not calls or any(map(_in_place, nodes)):
        return 0
    wanted = _wanted(calls)
    padded: dict[fx.Node, fx.Node] = {}  # by the nodes they stand for
    carried = []
    for node in nodes:
        rows = [node.args[0]] if node in calls else _rows_of(node) if node in wanted else None
        if rows and (node in calls or any(row in padded for row in rows)):
            _carry(node, rows, padded)
            carried.append(node)
    for node in reversed(carried):
        _cut(node, padded[node])
    return len(calls)


def _would_pad(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in MULTIPLES:
        return False
    tokens = _tokens(node)
    return bool(tokens) and tokens % MULTIPLES[node.target] != 0


def _wanted(calls: set[fx.Node]) -> set[fx.Node]:
    """What acts on each row alone on a way to one of the calls."""
    found: set[fx.Node] = set()
    pending: list[Any] = [call.args[0] for call in calls]
    while pending:
        node = pending.pop()
        rows = _rows_of(node)
        if node not in found and rows is not None:
            found.add(node)
            pending += rows
    return found


def _rows_of(node: fx.Node) -> list[fx.Node] | None:
    """The operands with the rows of a node that acts on each row alone; None for any other node.

    All else that it reads is numbers, or one vector for all rows.
    """
    if not _tokens(node) or not get_example_value(node).is_contiguous() or not _by_row(node):
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


def _by_row(node: fx.Node) -> bool:
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


def _carry(node: fx.Node, rows: list[Any], padded: dict[fx.Node, fx.Node]) -> None:
    """Put the node's double on padded rows in front of it; ``rows``: its operands to replace."""
    with node.graph.inserting_before(node):
        doubles = {row: padded.get(row) or _pad(row) for row in rows}
        padded.update(doubles)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: doubles.get(each, each))
        double = node.graph.create_node(node.op, node.target, args, kwargs)
    shape = get_example_value(doubles[rows[0]]).shape[0], get_example_value(node).shape[-1]
    _means(double, get_example_value(node).new_empty(shape))
    padded[node] = double


def _pad(node: fx.Node) -> fx.Node:
    """[tokens, C], with rows of zeros behind, in front of the insertion point."""
    graph, value = node.graph, get_example_value(node)
    tokens, width = _tokens(node), value.shape[-1]
    flat = node
    if value.dim() != 2:
        flat = graph.call_method("reshape", (node, (tokens, width)))
        _means(flat, value.new_empty(tokens, width))
    missing = -tokens % _PADDED
    found = graph.call_function(F.pad, (flat, (0, 0, 0, missing)))
    _means(found, value.new_empty(tokens + missing, width))
    return found


def _cut(node: fx.Node, double: fx.Node) -> None:
    """Let whoever still reads the node read the first rows of its double."""
    if node.users:
        graph, value = node.graph, get_example_value(node)
        with graph.inserting_before(node):
            first = graph.call_function(operator.getitem, (double, slice(0, _tokens(node))))
            _means(first, get_example_value(double)[: _tokens(node)])
            shaped = graph.call_method("reshape", (first, tuple(value.shape)))
        shaped.meta = dict(node.meta)
        node.replace_all_uses_with(shaped)
    node.graph.erase_node(node)


def _means(node: fx.Node, value: Tensor) -> None:
    node.meta["example_value"] = value


def _tokens(node: fx.Node) -> int:
    """Rows of a node's value [..., C]; 0 where they are not known now, or there are none."""
    value = get_example_value(node)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return 0
    known = all(isinstance(size, int) for size in value.shape)
    return value.numel() // value.shape[-1] if known and value.shape[-1] else 0


def _in_place(node: fx.Node) -> bool:
    """Whether it may change what it reads."""
    if node.op not in ("call_function", "call_method"):
        return False
    target, flags = node.target, (*node.args[1:], *node.kwargs.values())
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        return True
    asked = target in _POINTWISE and any(flag is True for flag in flags)
    return asked or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
