"""Nodes that do more than compute a value from their inputs: they write in place, or draw."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import fx

from .flat_graph import may_write, name_target

_DRAWS = ("bernoulli", "multinomial", "normal", "poisson", "rrelu", "gumbel_softmax")


def may_write_in_place(node: fx.Node) -> bool:
    """Returns whether a node may change what it reads."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if may_write(node.target):
        return True
    return bool(_bind(node).get("inplace")) or "out" in node.kwargs


def may_draw(node: fx.Node) -> bool:
    """Returns whether the value of a node may depend on a random number generator."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_target(node.target)
    if "dropout" in name:
        arguments = _bind(node)
        return bool(arguments.get("training", True)) and arguments.get("p", 1.0) != 0
    if name == "scaled_dot_product_attention":  # (query, key, value, attn_mask, dropout_p, ...)
        return bool((*node.args[4:5], node.kwargs.get("dropout_p", 0.0))[0])
    return name.startswith(("rand", *_DRAWS))


def _bind(node: fx.Node) -> Mapping[str, Any]:
    """Returns the arguments of a node by name, defaults among them, as far as they are known."""
    signature = None if isinstance(node.target, str) else _find_signature(node.target)
    if signature is None:
        return node.kwargs
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return node.kwargs
    bound.apply_defaults()
    return bound.arguments


@cache
def _find_signature(target: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # a builtin
        return None
