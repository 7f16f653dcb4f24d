"""``act(op(x, w, b)) -> nm_op(x, packed w, b, act)`` for every use a kernel was planned for."""

from __future__ import annotations

from torch import fx

from ...backends.registry import find_family
from ...graph.flat_graph import get_example_value
from ..analysis.find_uses import bind_operands
from ..planned_weight import Plan, PlannedWeight, WeightUse


def lower_sparse(gm: fx.GraphModule, plan: Plan) -> int:
    """Rewrites every use that a kernel takes over; returns how many.

    The placeholder then stands for the packed weight: whoever calls the graph passes that.
    """
    return sum(_lower(gm.graph, row, use) for row in plan for use in row.kernel_uses)


def _lower(graph: fx.Graph, row: PlannedWeight, use: WeightUse) -> int:
    weight, problem = row.placeholder, use.problem
    if row.kernel is None or weight not in use.node.all_input_nodes or not use.last.users:
        return 0
    operands = bind_operands(use.node)
    x, bias = operands["input"], operands.get("bias")
    family, rows = find_family(row.kernel.name), row.shape[0]
    with graph.inserting_before(use.last):
        if get_example_value(x).dtype != problem.dtype:  # autocast would cast it inside the op
            x = graph.call_method("to", (x, problem.dtype))
            x.meta["example_value"] = get_example_value(operands["input"]).to(problem.dtype)
        op, arguments = family.call(problem, row.weight_format, row.kernel.tile)
        new = graph.call_function(op, (x, weight, bias, rows), arguments)
    new.meta = dict(use.last.meta)
    use.last.replace_all_uses_with(new)
    for node in dict.fromkeys((use.last, use.node)):
        graph.erase_node(node)
    return 1
