"""``op(x, w) -> op(x, mask_ste(w))``: the forward runs masked, the gradient stays dense."""

from __future__ import annotations

from torch import Tensor, fx

from ...graph.flat_graph import get_example_value
from ...graph.read_through import read_through
from ...masks.mask_ste import mask_ste_op
from ..planned_weight import Plan, PlannedWeight


def insert_mask_ste(gm: fx.GraphModule, plan: Plan) -> int:
    """Masks every weight whose mask is not frozen before its first reader; returns how many.

    A weight is masked everywhere it is read, so one mask per graph serves tied weights and the
    sub-graphs (checkpointed blocks) the weight is passed into.
    """
    return sum(_mask(row) for row in plan if not row.is_frozen and row.held is None)


def _mask(row: PlannedWeight) -> int:
    weight, pattern = row.placeholder, str(row.pattern)
    readers = [user for user in weight.users if user.target is not mask_ste_op]
    if not readers:
        return 0
    value = get_example_value(weight)
    example = mask_ste_op(value, pattern) if isinstance(value, Tensor) else None
    read_through(weight, readers, mask_ste_op, (weight, pattern), example)
    return 1
