"""``op(x, w) -> op(x, hold_mask(w, mask))``: a mask that is an input, and a dense gradient."""

from __future__ import annotations

from torch import fx

from ...graph.added_inputs import HELD, add_input, is_added
from ...graph.flat_graph import get_example_value
from ...graph.read_through import read_through
from ...masks.held_mask import hold_mask_op, soft_threshold_op
from ..planned_weight import Plan, PlannedWeight


def insert_held_masks(gm: fx.GraphModule, plan: Plan) -> int:
    """Masks every weight whose mask is held, or softly thresholded; returns how many.

    The masks (or scales) become inputs of the graph, behind all others, in the order of the plan.
    """
    rows = [row for row in plan if row.held is not None]
    if any(is_added(node, HELD) for node in gm.graph.find_nodes(op="placeholder")):
        return 0
    return sum(_mask(gm.graph, row) for row in rows)


def _mask(graph: fx.Graph, row: PlannedWeight) -> int:
    assert row.held is not None
    weight, readers = row.placeholder, list(row.placeholder.users)
    held = add_input(graph, HELD, weight, row.held)
    if readers:
        op = soft_threshold_op if row.soft else hold_mask_op
        options = (str(row.pattern),) if row.soft else ()
        example = None
        if "example_value" in held.meta:
            example = op(get_example_value(weight), held.meta["example_value"], *options)
        read_through(weight, readers, op, (weight, held, *options), example)
    return 1
