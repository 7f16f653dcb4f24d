"""What rewrites that look for several nodes in a row ask of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ...graph.flat_graph import get_example_value


def commute(node: Any, target: Any) -> tuple[tuple[Any, Any], ...]:
    """Returns the operands of a binary op in both orders; nothing for another node."""
    if not isinstance(node, fx.Node) or node.target is not target or len(node.args) != 2:
        return ()
    first, second = node.args
    return (first, second), (second, first)


def share_dtype(*nodes: Any) -> bool:
    """Returns whether all are nodes, and their values tensors of one dtype."""
    if not all(isinstance(node, fx.Node) for node in nodes):
        return False
    values = [get_example_value(node) for node in nodes]
    if not all(isinstance(value, Tensor) for value in values):
        return False
    return len({value.dtype for value in values}) == 1
