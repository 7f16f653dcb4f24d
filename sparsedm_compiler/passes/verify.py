"""The laws of a rewritten graph: no pruned weight is read past its mask or its kernel."""

from __future__ import annotations

from typing import Any

import torch

from ..backends.registry import find_family
from ..errors import GraphError
from ..graph.added_inputs import HELD, LAYOUT, MASK, is_added
from ..masks.held_mask import hold_mask_op, soft_threshold_op
from ..masks.mask_ste import mask_ste_op
from .planned_weight import Plan, PlannedWeight


def verify_masked(plan: Plan) -> None:
    """Raises GraphError unless every planned weight is read only through its mask."""
    for row in plan:
        weight, pattern = row.placeholder, row.pattern
        if row.layout is not None:
            _verify_layout(row)
            continue
        if row.frozen is not None:
            _verify_frozen(row)
            continue
        if row.held is not None:
            _verify_held(row)
            continue
        unmasked = [user for user in weight.users if user.target is not mask_ste_op]
        if unmasked:
            raise GraphError(
                f"{weight.name} is read unmasked by {unmasked[0].name}: {unmasked[0].format_node()}"
            )
        for mask in weight.users:
            if mask.args != (weight, str(pattern)) or not mask.users:
                raise GraphError(f"{mask.format_node()} does not mask {weight.name} to {pattern}")


def _verify_held(row: PlannedWeight) -> None:
    """Raises GraphError unless a weight is read only through its held mask or soft threshold."""
    weight, wanted = row.placeholder, soft_threshold_op if row.soft else hold_mask_op
    for reader in weight.users:
        held = reader.args[1] if reader.target is wanted else None
        if not is_added(held, HELD) or reader.args[0] is not weight:
            raise GraphError(
                f"{weight.name}, whose mask is held, is read unmasked by {reader.name}: "
                f"{reader.format_node()}"
            )


def _verify_frozen(row: PlannedWeight) -> None:
    """Raises GraphError unless only a product with its frozen mask reads a weight."""
    weight = row.placeholder
    for reader in weight.users:
        mask = reader.args[0] if reader.target is torch.where else None
        if not is_added(mask, MASK) or reader.args[1:] != (weight, 0.0):
            raise GraphError(
                f"{weight.name}, whose mask is frozen, is read unmasked by {reader.name}: "
                f"{reader.format_node()}"
            )


def _verify_layout(row: PlannedWeight) -> None:
    """Raises GraphError unless only its kernel reads a weight, with its frozen layout."""
    assert row.kernel is not None
    weight, op = row.placeholder, find_family(row.kernel.name).training_op
    for reader in weight.users:
        if reader.target is not op or reader.args[1] is not weight:
            raise GraphError(
                f"{weight.name}, whose mask is frozen, is read by {reader.name}, which is no "
                f"{row.kernel.name}: {reader.format_node()}"
            )
        if not is_added(reader.args[3], LAYOUT):
            raise GraphError(f"{reader.format_node()} does not get what {weight.name} keeps")


def verify_folded(plan: Plan) -> None:
    """Raises GraphError unless only its kernel reads what is passed in the place of a weight.

    A weight that stays dense is passed masked, so that any node may read it.
    """
    for row in plan:
        if row.kernel is None:
            continue
        weight, family = row.placeholder, find_family(row.kernel.name)
        ops: dict[Any, int] = {
            family.call(problem, row.weight_format, row.kernel.tile)[0]: 1
            for problem in row.problems
        }
        parts = family.rounding_ops
        ops |= {parts[op].multiply: 3 for op in [*ops] if op in parts}
        ops |= {family.norm_ops[op]: 1 for op in [*ops] if op in family.norm_ops}
        if not weight.users:
            raise GraphError(f"no {row.kernel.name} reads the packed weight {weight.name}")
        for reader in weight.users:
            position = ops.get(reader.target)
            if position is None or reader.args[position] is not weight:
                raise GraphError(
                    f"the packed weight {weight.name} is read by {reader.name}, which is no "
                    f"{row.kernel.name}: {reader.format_node()}"
                )
