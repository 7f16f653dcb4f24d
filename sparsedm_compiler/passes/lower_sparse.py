"""``act(op(x, w, b)) -> nm_op(x, packed w, b, act)`` for every use a kernel was chosen for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..backends.cpu.ops import nm_conv2d_op, nm_linear_op
from ..graph import value_of
from .find_uses import Use, operands


def lower_sparse(gm: fx.GraphModule, chosen: Sequence[tuple[Use, fx.Node, int, int]]) -> int:
    """Rewrite each (use, weight placeholder, output rows, tile); how many were rewritten.

    The placeholder then stands for the packed weight: whoever calls the graph passes that.
    """
    return sum(_lower(gm.graph, *each) for each in chosen if each[0].node.graph is gm.graph)


def _lower(graph: fx.Graph, use: Use, weight: fx.Node, rows: int, tile: int) -> int:
    if weight not in use.node.all_input_nodes or not use.last.users:
        return 0
    given = operands(use.node)
    x, bias = given["input"], given.get("bias")
    with graph.inserting_before(use.last):
        if value_of(x).dtype != use.dtype:  # autocast would have cast it inside the op
            x = graph.call_method("to", (x, use.dtype))
            x.meta["example_value"] = value_of(given["input"]).to(use.dtype)
        if use.kernel:
            geometry = (use.kernel, use.stride, use.padding, use.dilation)
            arguments = (x, weight, bias, rows, *map(list, geometry), use.act, tile)
            new = graph.call_function(nm_conv2d_op, arguments)
        else:
            new = graph.call_function(nm_linear_op, (x, weight, bias, rows, use.act, tile))
    new.meta = dict(use.last.meta)
    use.last.replace_all_uses_with(new)
    for node in dict.fromkeys((use.last, use.node)):
        graph.erase_node(node)
    return 1
