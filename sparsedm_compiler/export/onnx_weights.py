"""The weights of an ONNX graph as its products read them: which axis is summed over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""The operators that multiply by weights."""

_PASSED = ("Identity", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear")
"""Ops that leave every value in its place."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A constant that a product reads.

    Attributes:
        name: Its name in the file.
        op: The product: "MatMul", "Gemm", "Conv" or "ConvTranspose".
        node: The product's name.
        axis: The axis of the constant that is summed over: input channels.
        rows: The axis of output channels; None for a vector.
        tensor: The constant, as onnx_ir holds it.
    """

    name: str
    op: str
    node: str
    axis: int
    rows: int | None
    tensor: Any

    def read_kept(self) -> Tensor:
        """Returns where the weight is not zero, [out, in, *kernel] as patterns are defined."""
        kept = torch.from_numpy(np.ascontiguousarray(self.tensor.numpy() != 0))
        if self.rows is None:
            return kept[None]
        others = [i for i in range(kept.dim()) if i not in (self.axis, self.rows)]
        if self.op in ("Conv", "ConvTranspose"):
            return kept.permute(self.rows, self.axis, *others)
        return kept.permute(*others, self.rows, self.axis).reshape(-1, kept.shape[self.axis])


def iterate_factors(graph: Any) -> Iterator[Factor]:
    """Yields every constant that a MatMul, Gemm, Conv or ConvTranspose of a graph reads.

    Subgraphs are looked through. A constant that several products read is yielded for each.
    """
    from onnx_ir.traversal import RecursiveGraphIterator

    for node in RecursiveGraphIterator(graph):
        for index, operand in enumerate(node.inputs[:2] if node.op_type in PRODUCTS else ()):
            constant = trace_constant(operand)
            if constant is None:
                continue
            name, tensor, order = constant
            axes = find_axes(node, index, len(order))
            if axes is not None:
                axis, rows = (None if i is None else order[i] for i in axes)
                assert axis is not None
                yield Factor(name, node.op_type, node.name or "", axis, rows, tensor)


def find_axes(node: Any, index: int, rank: int) -> tuple[int, int | None] | None:
    """Returns (axis summed over, axis of output channels) of an operand; None for no weight.

    As the ONNX operators define them: MatMul sums over K of [..., M, K] and [..., K, N], Gemm over
    the same of what transA and transB make of its matrices, Conv over C of [M, C, *kernel], and
    ConvTranspose over C of [C, M, *kernel].
    """
    if node.domain != "" or rank == 0:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return None if index == 0 else (1, 0) if node.op_type == "Conv" else (0, 1)
    if rank == 1:
        return 0, None
    last = index == 0
    if node.op_type == "Gemm" and node.attributes.get_int(("transA", "transB")[index], 0):
        last = not last
    return (rank - 1, rank - 2) if last else (rank - 2, rank - 1)


def trace_constant(value: Any) -> tuple[str, Any, list[int]] | None:
    """Returns the constant behind a value and its transposes and casts; None without one.

    Returns:
        (name, tensor, the axis of the tensor that each axis of the value is).
    """
    orders: list[Sequence[int] | None] = []
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Constant" and "value" in node.attributes:
            return _untangle(str(value.name), node.attributes.get_tensor("value"), orders)
        if node.op_type == "Transpose":
            orders.append(node.attributes.get_ints("perm", None))
        elif node.op_type not in _PASSED:
            return None
        value = node.inputs[0]
    return None if value is None else _untangle(str(value.name), value.const_value, orders)


def _untangle(
    name: str, tensor: Any, orders: Sequence[Sequence[int] | None]
) -> tuple[str, Any, list[int]]:
    """Returns the result of ``trace_constant``; orders: transposes, the one read last first."""
    axes = [*range(len(tensor.shape))]
    for order in reversed(orders):
        axes = [axes[i] for i in order] if order is not None else axes[::-1]
    return name, tensor, axes
