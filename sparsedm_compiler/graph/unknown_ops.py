"""Ops beside the op table that may multiply by a weight all the same."""

from __future__ import annotations

from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from .flat_graph import Op, name_target
from .op_table import OP_TABLE

_CELLS = ("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell")
_PRODUCTS = (
    *("gru", "lstm", "rnn_tanh", "rnn_relu", *_CELLS),
    *("addbmm", "chain_matmul", "convolution", "linalg_multi_dot"),
)
"""Names of functions of torch that multiply by weights, and are not in the table."""


def may_multiply(op: Op) -> bool:
    """Returns whether an op that is not in the table may be a product: a custom op, or a known one.

    Arithmetic on a weight (a learned position that is added) is none.
    """
    target = op.node.target
    if target in OP_TABLE or op.node.op != "call_function":
        return False
    overloads = (OpOverload, OpOverloadPacket, HigherOrderOperator)
    return isinstance(target, overloads) or describe_target(op) in _PRODUCTS


def describe_target(op: Op) -> str:
    """Returns the name of what an op calls, e.g. "mylib.linear.default", "gru"."""
    target = op.node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return str(target)
    return name_target(target)
