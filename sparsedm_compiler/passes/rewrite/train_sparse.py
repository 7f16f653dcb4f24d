"""``linear(x, mask_ste(w), b) -> train_op(x, mask_ste(w), b)`` where a kernel was asked for."""

from __future__ import annotations

from torch import fx

from ...backends.registry import find_family
from ...graph.flat_graph import get_example_value
from ...patterns import TransposableNM
from ..analysis.find_uses import bind_operands
from ..planned_weight import Plan, PlannedWeight, WeightUse


def train_sparse(gm: fx.GraphModule, plan: Plan) -> int:
    """Lets a kernel multiply by masked weights in training; returns how many products."""
    return sum(_rewrite(gm.graph, use, row) for row in plan for use in row.kernel_uses)


def _rewrite(graph: fx.Graph, use: WeightUse, row: PlannedWeight) -> int:
    if row.kernel is None or not use.node.users:
        return 0
    training_op = find_family(row.kernel.name).training_op
    assert training_op is not None
    transposable = isinstance(row.pattern, TransposableNM)
    operands = bind_operands(use.node)
    with graph.inserting_before(use.node):
        cast = [_cast(graph, operands.get(name), use) for name in ("input", "weight", "bias")]
        product = graph.call_function(training_op, (*cast, transposable))
    product.meta = dict(use.node.meta)
    use.node.replace_all_uses_with(product)
    graph.erase_node(use.node)
    return 1


def _cast(graph: fx.Graph, node: fx.Node | None, use: WeightUse) -> fx.Node | None:
    """Returns the operand in the dtype of the product, as autocast casts it inside the op."""
    dtype = use.problem.dtype
    if node is None or get_example_value(node).dtype == dtype:
        return node
    cast = graph.call_method("to", (node, dtype))
    cast.meta["example_value"] = get_example_value(node).to(dtype)
    return cast
