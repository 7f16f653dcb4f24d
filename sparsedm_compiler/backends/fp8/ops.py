"""The custom op ``sparsedm::fp8_linear``: W x + b, both rounded to e4m3, by ``torch._scaled_mm``.

Its tile is (scaled,): 1 where torch's kernel scales rows of x and of W itself and adds the bias,
which it does for bfloat16 alone; 0 where it gives the bare sums, which one more kernel scales,
biases and activates. One NaN or Inf in a row of x makes all outputs of that row NaN.
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
from ..custom_op import apply_activation, fake_linear, register

SCHEMA = "str act, str kind, int scaled"
"""The arguments of the op behind ``rows``; kind: "fp8"."""


def run_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, act: str, kind: str, scaled: int
) -> Tensor:
    """Returns act(W x + b): x [..., cols] -> [..., rows]."""
    return run_rounded(x, *quantize_rows(x, kind), packed, bias, rows, act, kind, scaled)


def run_rounded(
    x: Tensor,
    numbers: Tensor,
    factors: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    kind: str,
    scaled: int,
) -> Tensor:
    """Returns the same of rows that are rounded already; x tells shape and dtype."""
    dtype = KINDS[kind][0]
    one, scales, weight_bytes = split_packed(packed, rows)
    if scaled and x.is_cuda and x.dtype is torch.bfloat16 and len(numbers):
        weight = weight_bytes.view(dtype).view(rows, -1)
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        by_row = factors[:, None], scales[None, :]
        out = _multiply(numbers, weight, by_row, bias, x.dtype)
        tokens = x.numel() // x.shape[-1]
        return apply_activation(out[:tokens], act).view(*x.shape[:-1], rows)

    def compute_sums(rounded: Tensor, content: Tensor) -> Tensor:
        weight = content.view(dtype).view(rows, -1)
        if not x.is_cuda:
            return F.linear(rounded.float(), weight.float())
        narrow = x.dtype if x.dtype is torch.bfloat16 else torch.float32
        return _multiply(rounded, weight, (one, one), None, narrow)

    return multiply_in_8_bits(x, (numbers, factors), packed, bias, rows, act, compute_sums)


def _multiply(
    rounded: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Returns torch's product of e4m3 numbers: [tokens, cols] by [rows, cols] -> [tokens, rows]."""
    return torch._scaled_mm(
        rounded, weight.t(), *scales, bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def reference_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, act: str, kind: str, scaled: int
) -> Tensor:
    """Returns the same but for the rounding of x, through which no gradient passes."""
    _, scales, weight_bytes = split_packed(packed, rows)
    weight = weight_bytes.view(KINDS[kind][0]).view(rows, -1).float() * scales[:, None]
    return differentiate_in_8_bits(x, weight, bias, act)


fp8_linear_op = register(
    "fp8_linear",
    SCHEMA,
    {"CPU": run_linear, "CUDA": run_linear},
    fake=fake_linear,
    reference=reference_linear,
)
fp8_rounded_linear_op = register_rounded("fp8_rounded_linear", SCHEMA, run_rounded)
fp8_conv2d_op = register_conv("fp8_conv2d", fp8_linear_op, SCHEMA)


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
    scaled: int,
) -> Tensor:
    """Returns act(W x + b) of what ``round_rows`` returned for x, rounded or not."""
    if numbers.dtype.itemsize > 1:
        return fp8_linear_op(numbers, packed, bias, rows, act, kind, scaled)
    return fp8_rounded_linear_op(x, numbers, factors, packed, bias, rows, act, kind, scaled)
