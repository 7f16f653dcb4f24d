"""``act(op(x, w, b)) -> nm_op(x, packed w, b, act)`` for every use a kernel was chosen for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ...backends.kernel_family import KernelConfig, WeightFormat
from ...backends.registry import find_family
from ...graph.flat_graph import get_example_value
from ..analysis.find_uses import WeightUse, bind_operands


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One use of a weight's placeholder that a kernel takes over; ``rows``: of the weight."""

    use: WeightUse
    weight: fx.Node
    rows: int
    form: WeightFormat
    kernel: KernelConfig


def lower_sparse(gm: fx.GraphModule, chosen: Sequence[Rewrite]) -> int:
    """Rewrite each use; how many were rewritten.

    The placeholder then stands for the packed weight: whoever calls the graph passes that.
    """
    return sum(_lower(gm.graph, each) for each in chosen if each.use.node.graph is gm.graph)


def _lower(graph: fx.Graph, rewrite: Rewrite) -> int:
    use, weight, work = rewrite.use, rewrite.weight, rewrite.use.work
    if weight not in use.node.all_input_nodes or not use.last.users:
        return 0
    given = bind_operands(use.node)
    x, bias = given["input"], given.get("bias")
    with graph.inserting_before(use.last):
        if get_example_value(x).dtype != work.dtype:  # autocast would have cast it inside the op
            x = graph.call_method("to", (x, work.dtype))
            x.meta["example_value"] = get_example_value(given["input"]).to(work.dtype)
        op, how = find_family(rewrite.kernel.name).call(work, rewrite.form, rewrite.kernel.tile)
        new = graph.call_function(op, (x, weight, bias, rewrite.rows, *how))
    new.meta = dict(use.last.meta)
    use.last.replace_all_uses_with(new)
    for node in dict.fromkeys((use.last, use.node)):
        graph.erase_node(node)
    return 1
