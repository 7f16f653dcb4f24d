"""``linear(x, mask_ste(w), b) -> train_op(x, mask_ste(w), b)`` where a kernel was asked for."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...backends.kernel_family import KernelFamily
from ...backends.registry import find_family
from ...graph.added_inputs import LAYOUT, add_input
from ...graph.flat_graph import get_example_value
from ...patterns import TransposableNM
from ..analysis.find_uses import bind_operands
from ..planned_weight import Plan, PlannedWeight, WeightUse


def train_sparse(gm: fx.GraphModule, plan: Plan) -> int:
    """Lets a kernel multiply by masked weights in training; returns how many products."""
    return sum(_rewrite(gm.graph, row) for row in plan)


def _rewrite(graph: fx.Graph, row: PlannedWeight) -> int:
    uses = [use for use in row.kernel_uses if use.node.users]
    if row.kernel is None or not uses:
        return 0
    family = find_family(row.kernel.name)
    arguments: tuple[Any, ...] = (isinstance(row.pattern, TransposableNM),)
    if family.layout_op is not None:
        masked = bind_operands(uses[0].node)["weight"]
        layout = _find_layout(graph, row, family, masked)
        arguments = layout, str(row.pattern), row.is_frozen
    for use in uses:
        _replace_product(graph, use, family, arguments)
    return len(uses)


def _find_layout(
    graph: fx.Graph, row: PlannedWeight, family: KernelFamily, masked: fx.Node
) -> fx.Node:
    """Returns the node of what a masked weight keeps: an input, where its mask is frozen."""
    if row.layout is not None:
        return add_input(graph, LAYOUT, row.placeholder, row.layout)
    assert family.layout_op is not None
    with graph.inserting_after(masked):
        layout = graph.call_function(family.layout_op, (masked, str(row.pattern)))
    layout.meta["example_value"] = family.layout_op(get_example_value(masked), str(row.pattern))
    return layout


def _replace_product(
    graph: fx.Graph, use: WeightUse, family: KernelFamily, arguments: tuple[Any, ...]
) -> None:
    """Puts the family's op in the place of a product."""
    assert family.training_op is not None
    operands = bind_operands(use.node)
    x, weight, bias = (operands.get(name) for name in ("input", "weight", "bias"))
    with graph.inserting_before(use.node):
        x = _cast(graph, x, use)
        if family.layout_op is None:
            weight, bias = _cast(graph, weight, use), _cast(graph, bias, use)
        product = graph.call_function(family.training_op, (x, weight, bias, *arguments))
    product.meta = dict(use.node.meta)
    use.node.replace_all_uses_with(product)
    graph.erase_node(use.node)


def _cast(graph: fx.Graph, node: fx.Node | None, use: WeightUse) -> fx.Node | None:
    """Returns the operand in the dtype of the product, as autocast casts it inside the op."""
    dtype = use.problem.dtype
    if node is None or get_example_value(node).dtype == dtype:
        return node
    cast = graph.call_method("to", (node, dtype))
    cast.meta["example_value"] = get_example_value(node).to(dtype)
    return cast
