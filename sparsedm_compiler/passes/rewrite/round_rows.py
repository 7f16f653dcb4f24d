"""``linear8(norm(x)) -> multiply8(round_norm(x))``: rounds rows to 8 bits once, norm included.

A linear op that rounds the rows of its input reads them twice and writes them once. Here a norm,
with adaLN's scale and shift, or an activation in front of it becomes part of that kernel, and
several linears that read the same rows share one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...backends.kernel_family import Op
from ...backends.registry import find_rounding_ops
from ...backends.row_rounding import RowRounding
from ...graph.effects import may_write_in_place
from ...graph.flat_graph import get_example_value
from ..planned_weight import Plan
from .match import commute, share_dtype

_NORMS = {F.layer_norm: "layer", F.rms_norm: "rms", torch.rms_norm: "rms"}
_NORM_NAMES = {
    "layer": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms": ("input", "normalized_shape", "weight", "eps"),
}


@dataclass(frozen=True, slots=True)
class _Prologue:
    """The part of a graph between ``source`` and the rows to be rounded, as ``round_rows`` does it.

    Attributes:
        source: The node whose rows it begins with.
        arguments: Keyword arguments of ``round_rows``.
    """

    source: fx.Node
    arguments: dict[str, Any] = field(default_factory=dict)


def round_rows(gm: fx.GraphModule, plan: Plan) -> int:
    """Splits linears that round their input into rounding and product; returns how many.

    The linears are those that a kernel family declares as its ``rounding_ops``. Only where
    something is saved: rows that several read, or behind a norm or an activation; and where nothing
    is changed in place.
    """
    if any(map(may_write_in_place, gm.graph.nodes)):
        return 0
    parts = find_rounding_ops()
    readers: dict[tuple[fx.Node, str, Any], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.target in parts:
            key = node.args[0], node.kwargs["kind"], parts[node.target].round_rows
            readers.setdefault(key, []).append(node)
    changes = 0
    for (rows, _, _), linears in readers.items():
        prologue = _find_prologue(rows, parts)
        if prologue.arguments or len(linears) > 1:
            _split(prologue, linears, parts)
            changes += len(linears)
    return changes


def _split(prologue: _Prologue, linears: list[fx.Node], parts: Mapping[Any, RowRounding]) -> None:
    graph, first = linears[0].graph, linears[0]
    with graph.inserting_before(first):
        rounding: Any = parts[first.target].round_rows
        pair = _call(graph, rounding, (prologue.source, first.kwargs["kind"]), prologue.arguments)
        numbers = _call(graph, operator.getitem, (pair, 0), {})
        factors = _call(graph, operator.getitem, (pair, 1), {})
    for linear in linears:
        operands = prologue.source, numbers, factors, *linear.args[1:]
        with graph.inserting_before(linear):
            multiply = parts[linear.target].multiply
            product = graph.call_function(multiply, operands, linear.kwargs)
        product.meta = dict(linear.meta)
        linear.replace_all_uses_with(product)
        graph.erase_node(linear)


def _call(
    graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node:
    """Returns a new node, with the value that it has for the example."""
    node = graph.call_function(target, args, kwargs)
    values = fx.map_arg((args, kwargs), get_example_value)
    with torch.no_grad():
        node.meta["example_value"] = target(*values[0], **values[1])
    return node


def _find_prologue(rows: fx.Node, parts: Mapping[Op, RowRounding]) -> _Prologue:
    """Returns the longest part of the graph in front of some rows that one kernel computes.

    Its values are of one dtype, and nothing else reads what lies in between.
    """
    unmodulated, modulation = _match_modulation(rows)
    norm = _match_norm(unmodulated)
    if norm is not None:
        return _Prologue(norm.source, {**norm.arguments, **modulation})
    act = _match_activation(rows, parts)
    return _Prologue(rows) if act is None else act


def _match_modulation(rows: fx.Node) -> tuple[fx.Node, dict[str, Any]]:
    """Returns (y, scale and shift) of y * (1 + scale) + shift, both [batch, 1, cols]."""
    for product, shift in commute(rows, operator.add):
        for y, factor in commute(product, operator.mul):
            for scale, one in commute(factor, operator.add):
                if one == 1 and _is_per_batch(scale, y) and _is_per_batch(shift, y):
                    return y, {"scale": scale, "shift": shift}
    return rows, {}


def _match_norm(y: fx.Node) -> _Prologue | None:
    """Returns a norm over the last dimension, if that is what y is."""
    target: Any = y.target
    if target not in _NORMS:
        return None
    names = _NORM_NAMES[_NORMS[target]]
    values: dict[str, Any] = {**dict(zip(names, y.args, strict=False)), **y.kwargs}
    source, epsilon = values["input"], values.get("eps", 1e-5 if "bias" in names else None)
    if len(values["normalized_shape"]) != 1 or epsilon is None or not share_dtype(source, y):
        return None
    affine = {name: values[name] for name in ("weight", "bias") if values.get(name) is not None}
    return _Prologue(source, {"norm": _NORMS[target], **affine, "epsilon": epsilon})


def _match_activation(rows: fx.Node, parts: Mapping[Op, RowRounding]) -> _Prologue | None:
    """Returns an activation of its own, or one taken from a linear in 8 bits, where rows are it."""
    source: Any = rows.args[0] if rows.args else None
    if rows.target in (F.gelu, F.silu) and share_dtype(source, rows):
        form = rows.kwargs.get("approximate", "none")
        name = "silu" if rows.target is F.silu else "gelu_tanh" if form == "tanh" else "gelu"
        return _Prologue(source, {"act": name})
    multiplies = {part.multiply for part in parts.values()}
    alone = all(user.target in parts and user.args[0] is rows for user in rows.users)
    if (rows.target in parts or rows.target in multiplies) and alone:
        act = rows.kwargs["act"]
        if act != "none":
            rows.kwargs = {**rows.kwargs, "act": "none"}
            return _Prologue(rows, {"act": act})
    return None


def _is_per_batch(node: Any, y: Any) -> bool:
    """Returns whether a node is one row of numbers for each batch of y [batch, tokens, cols]."""
    if not isinstance(node, fx.Node) or not isinstance(y, fx.Node):
        return False
    value, like = get_example_value(node), get_example_value(y)
    if not isinstance(value, Tensor) or not isinstance(like, Tensor) or like.dim() != 3:
        return False
    return value.shape == (like.shape[0], 1, like.shape[2]) and value.dtype == like.dtype
