"""``act(op(x, w, b)) -> nm_op(x, packed w, b, act)`` for every use a kernel was chosen for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..backends.cpu.ops import nm_conv2d_op, nm_linear_op
from ..graph import value_of
from .find_uses import Use, operands


def lower_sparse(gm: fx.GraphModule, chosen: Sequence[tuple[Use, fx.Node, int, int]]) -> int:
    """Rewrite each (use, weight placeholder, output rows, tile); how many were rewritten.

    The placeholder then stands for the packed weight: whoever calls the graph passes that.
    """
    return sum(_lower(gm.graph, *each) for each in chosen if each[0].node.graph is gm.graph)


def kernel_call(use: Use, tile: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The op that runs a use, and its arguments behind (x, packed weight, bias, rows)."""
    if not use.kernel:
        return nm_linear_op, (use.act, tile)
    geometry = (use.kernel, use.stride, use.padding, use.dilation)
    return nm_conv2d_op, (*map(list, geometry), use.act, tile)


def _lower(graph: fx.Graph, use: Use, weight: fx.Node, rows: int, tile: int) -> int:
    if weight not in use.node.all_input_nodes or not use.last.users:
        return 0
    given = operands(use.node)
    x, bias = given["input"], given.get("bias")
    with graph.inserting_before(use.last):
        if value_of(x).dtype != use.dtype:  # autocast would have cast it inside the op
            x = graph.call_method("to", (x, use.dtype))
            x.meta["example_value"] = value_of(given["input"]).to(use.dtype)
        op, how = kernel_call(use, tile)
        new = graph.call_function(op, (x, weight, bias, rows, *how))
    new.meta = dict(use.last.meta)
    use.last.replace_all_uses_with(new)
    for node in dict.fromkeys((use.last, use.node)):
        graph.erase_node(node)
    return 1
