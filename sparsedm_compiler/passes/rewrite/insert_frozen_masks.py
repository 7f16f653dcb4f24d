"""``op(x, w) -> op(x, where(mask, w, 0))``: a mask that is an input, and a masked gradient."""

from __future__ import annotations

import torch
from torch import fx

from ...graph.added_inputs import MASK, add_input, is_added
from ...graph.flat_graph import get_example_value
from ...graph.read_through import read_through
from ..planned_weight import Plan, PlannedWeight


def insert_frozen_masks(gm: fx.GraphModule, plan: Plan) -> int:
    """Masks every weight whose mask is frozen; returns how many were masked.

    The masks become inputs of the graph, behind all others, in the order of the plan. The op is
    torch's own, so that a compiler fuses it with the cast of the weight and of its gradient.
    """
    rows = [row for row in plan if row.frozen is not None]
    if len(list_mask_inputs(gm.graph)) == len(rows):
        return 0
    return sum(_mask(gm.graph, row) for row in rows)


def list_mask_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Returns the placeholders of frozen masks, in order."""
    return [node for node in graph.find_nodes(op="placeholder") if is_added(node, MASK)]


def _mask(graph: fx.Graph, row: PlannedWeight) -> int:
    assert row.frozen is not None
    weight, readers = row.placeholder, list(row.placeholder.users)
    mask = add_input(graph, MASK, weight, row.frozen)
    if readers:
        known = "example_value" in mask.meta
        example = torch.empty_like(get_example_value(weight)) if known else None
        read_through(weight, readers, torch.where, (mask, weight, 0.0), example)
    return 1
