"""``vnm(act(vnm(x)))``: keeps activations feature-major between consecutive products.

A kernel that gathers features has to turn row-major activations around first. So an op that can
write them feature-major does so where only its like reads them, which saves the next one a
transpose.
"""

from __future__ import annotations

from collections.abc import Set

import torch.nn.functional as F
from torch import fx

from ...backends.kernel_family import Op
from ...backends.registry import find_feature_major_ops
from ..planned_weight import Plan

_ELEMENTWISE = (F.gelu, F.silu, F.relu, F.dropout)
"""Ops that compute each element apart and preserve the strides of a tensor."""


def carry_features(gm: fx.GraphModule, plan: Plan) -> int:
    """Sets ``feature_major`` of products that only such products read; returns how many it set.

    The ops are those that a kernel family declares as its ``feature_major_op``.
    """
    ops = find_feature_major_ops()
    producers = [
        node
        for node in gm.graph.nodes
        if node.target in ops and not node.kwargs["feature_major"] and _feeds_only(node, ops)
    ]
    for node in producers:
        node.kwargs = {**node.kwargs, "feature_major": True}
    return len(producers)


def _feeds_only(node: fx.Node, ops: Set[Op]) -> bool:
    """Returns whether every reader is one of the ops, or elementwise in front of one."""
    return bool(node.users) and all(
        user.target in ops or (user.target in _ELEMENTWISE and _feeds_only(user, ops))
        for user in node.users
    )
