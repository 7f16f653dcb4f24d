"""Calls of one function in a graph -> calls of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def retarget(
    gm: fx.GraphModule,
    old: Any,
    new: Callable[..., Any],
    applies: Callable[[fx.Node], bool] = lambda node: True,
) -> int:
    """Exchanges what nodes of a graph and its sub-graphs call; returns how many there were.

    Args:
        gm: The graph; edited in place.
        old: The function that is called.
        new: What is called instead, with the same arguments.
        applies: Which calls to exchange.
    """
    count = 0
    for module in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
        nodes = module.graph.find_nodes(op="call_function", target=old)
        nodes = [node for node in nodes if applies(node)]
        for node in nodes:
            node.target = new
        if nodes:
            module.recompile()
        count += len(nodes)
    return count
