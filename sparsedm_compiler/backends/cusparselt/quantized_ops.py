"""The custom op ``sparsedm::semi_quantized_linear``: 2:4 in 8 bits, by cuSPARSELt.

The products are summed exactly (int8) or in float32 (e4m3) and rounded to bfloat16 where that is
the output's dtype; then one kernel scales them, adds the bias and activates. One NaN or Inf in a
row of x makes all outputs of that row NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cuda.im2col import register_conv
from ..cuda.quantize import KINDS, quantize_rows
from ..cuda.quantized_family import (
    differentiate_in_8_bits,
    multiply_in_8_bits,
    register_rounded,
    split_packed,
)
from ..custom_op import fake_linear, register
from .format import unpack24
from .ops import SETTING_SCHEMA, CuSparseLtSetting, multiply, to_dense

# The library scales 8-bit products by one number that torch reads back from the GPU (which no CUDA
# graph can hold) or by a vector, which not all versions take. So it gives the bare sums.
_SUMS = {"int8": torch.int32, "fp8": torch.float32}


def _run(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    kind: str,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    rounded = quantize_rows(x, kind)
    return _multiply(x, *rounded, packed, bias, rows, act, kind, algorithm, split_k, split_k_mode)


def _multiply(
    x: Tensor,
    numbers: Tensor,
    factors: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    kind: str,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    setting = CuSparseLtSetting(algorithm, split_k, split_k_mode)

    def compute_sums(rounded: Tensor, weight: Tensor) -> Tensor:
        if not weight.is_cuda:
            exact = torch.float64 if kind == "int8" else torch.float32
            return F.linear(rounded.to(exact), unpack24(weight).to(exact))
        narrow = x.dtype if x.dtype is torch.bfloat16 else _SUMS[kind]
        return multiply(_view_numbers(weight, rows, kind), rounded, None, setting, narrow)

    return multiply_in_8_bits(x, (numbers, factors), packed, bias, rows, act, compute_sums)


def _reference(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    kind: str,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    _, scales, numbers = split_packed(packed, rows)
    weight = unpack_numbers(numbers, rows, x.shape[-1], kind) * scales[:, None]
    return differentiate_in_8_bits(x, weight, bias, act)


def unpack_numbers(numbers: Tensor, rows: int, cols: int, kind: str) -> Tensor:
    """Returns the rounded matrix [rows, cols] in float32 of a packed weight's numbers, as bytes."""
    viewed = _view_numbers(numbers, rows, kind) if numbers.is_cuda else numbers
    return to_dense(viewed, rows, cols, _SUMS[kind]).float()


def _view_numbers(numbers: Tensor, rows: int, kind: str) -> Tensor:
    """Returns the bytes as ``torch._cslt_compress`` gave them."""
    return numbers.view(KINDS[kind][0]).view(rows, -1)


_SCHEMA = f"str act, str kind, {SETTING_SCHEMA}"
semi_quantized_linear_op = register(
    "semi_quantized_linear",
    _SCHEMA,
    {"CPU": _run, "CUDA": _run},
    fake=fake_linear,
    reference=_reference,
)
semi_rounded_linear_op = register_rounded("semi_rounded_linear", _SCHEMA, _multiply)


def multiply_rounded(
    x: Tensor,
    numbers: Tensor,
    factors: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    *,
    act: str,
    kind: str,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    """Returns act(W x + b) of what ``round_rows`` returned for x, rounded or not."""
    setting = act, kind, algorithm, split_k, split_k_mode
    if numbers.dtype.itemsize > 1:
        return semi_quantized_linear_op(numbers, packed, bias, rows, *setting)
    return semi_rounded_linear_op(x, numbers, factors, packed, bias, rows, *setting)


semi_quantized_conv2d_op = register_conv("semi_quantized_conv2d", semi_quantized_linear_op, _SCHEMA)
