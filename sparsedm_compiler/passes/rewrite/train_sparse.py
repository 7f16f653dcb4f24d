"""``linear(x, mask_ste(w), b) -> semi_train(x, mask_ste(w), b)`` where that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ...backends.cusparselt.training import semi_train_op
from ...graph.flat_graph import get_example_value
from ..analysis.find_uses import WeightUse, bind_operands


def train_sparse(gm: fx.GraphModule, chosen: Sequence[tuple[WeightUse, bool]]) -> int:
    """Rewrite each (use of a masked weight, whether its mask is transposable); how many."""
    for use, transposable in chosen:
        given = bind_operands(use.node)
        with gm.graph.inserting_before(use.node):
            cast = [_cast(gm.graph, given.get(name), use) for name in ("input", "weight", "bias")]
            new = gm.graph.call_function(semi_train_op, (*cast, transposable))
        new.meta = dict(use.node.meta)
        use.node.replace_all_uses_with(new)
        gm.graph.erase_node(use.node)
    return len(chosen)


def _cast(graph: fx.Graph, node: fx.Node | None, use: WeightUse) -> fx.Node | None:
    """In the dtype of the product, as autocast would have cast it inside the op."""
    if node is None or get_example_value(node).dtype == use.work.dtype:
        return node
    cast = graph.call_method("to", (node, use.work.dtype))
    cast.meta["example_value"] = get_example_value(node).to(use.work.dtype)
    return cast
