"""The custom op ``sparsedm::semi_linear``: W x + b, W in 2:4, by cuSPARSELt.

On a CPU it is its own reference: the portable format, dense in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ..cuda.im2col import register_conv
from ..cuda.token_padding import align, apply_to_tokens
from ..custom_op import apply_activation, fake_linear, register
from .format import read_header, unpack24

TOKENS = 8
"""cuSPARSELt wants a multiple of this number of tokens in 16-bit types."""
_PIECE = 1024


class CuSparseLtSetting(NamedTuple):
    """The choices that cuSPARSELt leaves for a product; the defaults are torch's own."""

    algorithm: int = 0
    split_k: int = 1
    split_k_mode: int = -1


DEFAULT = CuSparseLtSetting()

SETTING_SCHEMA = "int algorithm, int split_k, int split_k_mode"
"""CuSparseLtSetting as the last arguments of an op."""


def semi_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    *,
    act: str,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    """Returns act(W x + b): x [..., cols] of the packed dtype -> [..., rows].

    The activation is not the op's, so that Inductor fuses it with what comes behind.
    """
    out = semi_linear_op(x, packed, bias, rows, algorithm, split_k, split_k_mode)
    return apply_activation(out, act)


def semi_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    """Returns act(W * x + b), a conv2d: [N, C, H, W] -> [N, rows, H', W']."""
    geometry, setting = (kernel, stride, padding, dilation), (algorithm, split_k, split_k_mode)
    return apply_activation(semi_conv2d_op(x, packed, bias, rows, *geometry, *setting), act)


def multiply(
    packed: Tensor,
    flat: Tensor,
    bias: Tensor | None,
    setting: CuSparseLtSetting,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns cuSPARSELt's product: [tokens, cols] -> [tokens, rows].

    Both lie row-major: the transposed view of ``flat`` is the column-major operand the library
    takes, and the result is written transposed. torch builds the plan anew in every call, on the
    host alone, and takes result and workspace from its caching allocator on the current stream: so
    a call can be captured in a CUDA graph, once it has run for its library to be loaded.

    Raises:
        KernelError: The library refuses the setting, or the size.
    """
    algorithm, split_k, mode = setting
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
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:  # an algorithm that is none, or none for these sizes
        tokens, cols = flat.shape
        raise KernelError(
            f"cuSPARSELt refuses algorithm {algorithm} with split_k {split_k} (mode {mode}) for "
            f"{tokens} tokens of {cols} columns: {str(error).splitlines()[0]}"
        ) from error


def to_dense(packed: Tensor, rows: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the masked matrix [rows, cols] of a weight packed for a CPU or for a GPU.

    dtype: of the result on a GPU; None for the packed one. There it is the product with the
    identity in pieces, which is exact: each sum has one term that is not zero. Only the sign of a
    negative zero is lost.
    """
    if not packed.is_cuda:
        _check_size(packed, rows, cols)
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
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    """Returns the result of ``semi_linear`` without the activation, by the dense op in float32."""
    weight = to_dense(packed, rows, x.shape[-1])
    bias = None if bias is None else bias.to(x.dtype).float()
    return F.linear(x.float(), weight.float(), bias).to(x.dtype)


def _run_on_cpu(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    dtype, *_ = read_header(packed)
    _check_dtype(x, dtype)
    setting = CuSparseLtSetting(algorithm, split_k, split_k_mode)
    return apply_to_tokens(
        x, rows, TOKENS, lambda flat: reference_linear(flat, packed, bias, rows, *setting)
    )


def _run_on_cuda(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    _check_dtype(x, packed.dtype)
    # The library reads the bias through its bare address, as numbers of the output's dtype.
    bias = None if bias is None else align(bias.to(x.dtype))
    setting = CuSparseLtSetting(algorithm, split_k, split_k_mode)
    return apply_to_tokens(x, rows, TOKENS, lambda flat: multiply(packed, flat, bias, setting))


def _check_dtype(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise KernelError(f"a weight packed for {dtype} takes inputs of it, not of {x.dtype}")


def _check_size(packed: Tensor, rows: int, cols: int) -> None:
    _, *size = read_header(packed)
    if size != [rows, cols]:
        raise KernelError(f"the packed weight is {size[0]} x {size[1]}, not {rows} x {cols}")


semi_linear_op = register(
    "semi_linear",
    SETTING_SCHEMA,
    {"CPU": _run_on_cpu, "CUDA": _run_on_cuda},
    fake=fake_linear,
    reference=reference_linear,
)
semi_conv2d_op = register_conv("semi_conv2d", semi_linear_op, SETTING_SCHEMA)
