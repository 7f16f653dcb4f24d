"""The custom op ``sparsedm::semi_linear``: W x + b, W in 2:4, by cuSPARSELt.

On a CPU it is its own reference: the portable format, dense in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ..cuda.im2col import conv_as_linear
from ..cuda.token_padding import aligned, by_rows
from ..custom_op import activate, fake_linear, register
from .format import stated24, unpack24

TOKENS = 8
"""Of what number cuSPARSELt wants a multiple of tokens in 16-bit types."""
DEFAULT = (0, 1, -1)
"""(algorithm, split_k, mode of split_k) as torch itself has them where nothing is asked."""
_PIECE = 1024


def semi_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, act: str, how: Sequence[int]
) -> Tensor:
    """x: [..., cols] of the packed dtype -> act(W x + b): [..., rows].

    The activation is not the op's, so that Inductor fuses it with what comes behind. ``how``: as
    DEFAULT.
    """
    return activate(semi_linear_op(x, packed, bias, rows, how), act)


def semi_conv2d(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, *how: Any) -> Tensor:
    """The same over patches; ``how``: kernel, stride, padding, dilation, act, how."""
    *geometry, act, setting = how
    return activate(semi_conv2d_op(x, packed, bias, rows, *geometry, setting), act)


def multiply(
    packed: Tensor,
    flat: Tensor,
    bias: Tensor | None,
    how: Sequence[int],
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """cuSPARSELt's product: [tokens, cols] -> [tokens, rows]. Raises KernelError if it refuses.

    Both lie row-major: the transposed view of ``flat`` is the column-major operand the library
    takes, and the result is written transposed. torch builds the plan anew in every call, on the
    host alone, and takes result and workspace from its caching allocator on the current stream: so
    a call can be captured in a CUDA graph, once it has run for its library to be loaded.
    """
    algorithm, split_k, mode = how
    try:
        return torch._cslt_sparse_mm(
            packed,
            flat.t(),
            bias=bias,
            out_dtype=out_dtype,
            transpose_result=True,
            alg_id=algorithm,
            split_k=split_k,
            split_k_mode=mode,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an algorithm that is none, or none for these sizes
        tokens, cols = flat.shape
        raise KernelError(
            f"cuSPARSELt refuses algorithm {algorithm} with split_k {split_k} (mode {mode}) for "
            f"{tokens} tokens of {cols} columns: {str(error).splitlines()[0]}"
        ) from error


def dense24(packed: Tensor, rows: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
    """[rows, cols]: the masked matrix, packed for a CPU or for a card; ``dtype``: on a card.

    There it is the product with the identity in pieces, which is exact: each sum has one term that
    is not zero. Only the sign of a negative zero is lost.
    """
    if not packed.is_cuda:
        _check(packed, rows, cols)
        return unpack24(packed)
    out = torch.empty(cols, rows, dtype=dtype or packed.dtype, device=packed.device)
    for start in range(0, cols, _PIECE):
        size = min(_PIECE, cols - start)  # a multiple of 16, as cols is
        one = torch.zeros(size, cols, device=packed.device)
        one[:, start : start + size].fill_diagonal_(1)
        piece = multiply(packed, one.to(packed.dtype), None, DEFAULT, dtype)
        out[start : start + size] = piece
    return out.t().contiguous()


def reference_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, how: Sequence[int]
) -> Tensor:
    """What ``semi_linear`` computes without the activation, by the dense op in float32."""
    weight = dense24(packed, rows, x.shape[-1])
    bias = None if bias is None else bias.to(x.dtype).float()
    return F.linear(x.float(), weight.float(), bias).to(x.dtype)


def _cpu(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, how: Sequence[int]) -> Tensor:
    dtype, *_ = stated24(packed)
    _same(x, dtype)
    return by_rows(x, rows, TOKENS, lambda flat: reference_linear(flat, packed, bias, rows, how))


def _cuda(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, how: Sequence[int]) -> Tensor:
    _same(x, packed.dtype)
    # The library reads the bias through its bare address, as numbers of the output's dtype.
    bias = None if bias is None else aligned(bias.to(x.dtype))
    return by_rows(x, rows, TOKENS, lambda flat: multiply(packed, flat, bias, how))


def _same(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise KernelError(f"a weight packed for {dtype} takes inputs of it, not of {x.dtype}")


def _check(packed: Tensor, rows: int, cols: int) -> None:
    _, *stated = stated24(packed)
    if stated != [rows, cols]:
        raise KernelError(f"the packed weight is {stated[0]} x {stated[1]}, not {rows} x {cols}")


semi_linear_op = register(
    "semi_linear",
    "int[] how",
    {"CPU": _cpu, "CUDA": _cuda},
    fake=fake_linear,
    reference=reference_linear,
)
semi_conv2d_op = conv_as_linear("semi_conv2d", semi_linear_op, "int[] how")
