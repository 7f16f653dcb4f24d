"""``vnm(act(vnm(x)))``: what one V:n:m layer hands to the next lies as the next one reads it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from ...backends.vnm.ops import vnm_linear_op
from ..planned_weight import Plan

_EACH = (F.gelu, F.silu, F.relu, F.dropout)
"""Ops that give every element its own result, and keep how a tensor lies in memory."""


def carry_features(gm: fx.GraphModule, plan: Plan) -> int:
    """Let V:n:m products write feature-major where only others read them; how many.

    The kernel gathers features, so that it has to turn row-major activations around first.
    """
    found = [
        node
        for node in gm.graph.find_nodes(op="call_function", target=vnm_linear_op)
        if not node.args[-1][-1] and _read_by_its_like(node)
    ]
    for node in found:
        *others, how = node.args
        node.args = (*others, [*how[:-1], 1])
    return len(found)


def _read_by_its_like(node: fx.Node) -> bool:
    """Whether every reader is a V:n:m product, or an op of _EACH before one."""
    return bool(node.users) and all(
        user.target is vnm_linear_op or (user.target in _EACH and _read_by_its_like(user))
        for user in node.users
    )
