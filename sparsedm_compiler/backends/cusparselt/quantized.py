"""The custom op ``sparsedm::semi_quantized_linear``: 2:4 in 8 bits, by cuSPARSELt.

W is rounded once, each row by its own scale; x in every call, by one scale of all its values. The
products are summed exactly (int8) or in float32 (e4m3), scaled, and rounded to the dtype of x. So
one NaN or Inf in x spreads over all outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PackError
from ...patterns import Pattern
from ..cuda.device import card, machine, no_cusparselt, no_fp8_cores, no_tensor_cores
from ..cuda.im2col import conv_as_linear, linear_or_conv
from ..cuda.token_padding import by_rows
from ..custom_op import activate, fake_linear, register
from ..kernel_family import KernelConfig, KernelFamily, MatmulProblem, OpCall, WeightFormat
from ..weight_matrix import from_matrix, matrix
from .family import misfit, rows_by_cols
from .format import pack24, unpack24
from .ops import DEFAULT, dense24, multiply

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""By name: the dtype, and its largest number."""
TOKENS = 16
TYPES = (torch.float16, torch.bfloat16, torch.float32)
_MULTIPLE = 32
# The library scales 8-bit products by one number that torch reads back from the card (which no CUDA
# graph can hold) or by a vector, which not all versions take. So it gives the bare sums.
_SUMS = {"int8": torch.int32, "fp8": torch.float32}


class QuantizedFamily(KernelFamily):
    """One kernel for masks of at most 2 in every aligned 4 columns, for any floating dtype.

    A packed weight is one tensor of bytes: the float32 scales of the rows, then what
    ``torch._cslt_compress`` gives for the rounded weight; on the CPU, as ``pack24`` gives it.
    """

    device = "cuda"
    inexact = "quantizes the weight and its inputs to 8 bits"

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.names = (f"cuda_semi_{kind}",)

    def unavailable(self) -> str | None:
        here = card()
        no_cores = no_fp8_cores(here) if self.kind == "fp8" else no_tensor_cores(here)
        return no_cores or no_cusparselt(here)

    def refusal(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        if dtype not in TYPES:
            return f"no 8-bit 2:4 kernel for {str(dtype).removeprefix('torch.')}"
        return misfit(pattern, rows, cols, _MULTIPLE)

    def candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        return (KernelConfig(self.names[0], (), DEFAULT),)

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        values, mask = rows_by_cols(weight, mask, pattern, self)
        rounded, scales = quantize(values, self.kind, each_row=True)
        packed = torch._cslt_compress(rounded) if values.is_cuda else pack24(rounded, mask)
        return torch.cat((scales.flatten().view(torch.uint8), packed.view(torch.uint8).flatten()))

    def unpack(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> Tensor:
        """The rounded weight, in float32: the one before is not to be had again."""
        cols = matrix(torch.empty(shape, device="meta")).shape[1]
        return from_matrix(_dense(packed, shape[0], cols, self.kind), shape[2:])

    def check(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> torch.dtype:
        raise PackError(f"no file holds weights packed for {self.names[0]}: it {self.inexact}")

    def call(self, work: MatmulProblem, form: WeightFormat, tile: tuple[int, ...]) -> OpCall:
        ops = semi_quantized_linear, semi_quantized_conv2d
        return linear_or_conv(*ops, work, work.act, self.kind, list(tile))

    def machine(self) -> tuple[Any, ...]:
        return machine()


def quantize(values: Tensor, kind: str, *, each_row: bool = False) -> tuple[Tensor, Tensor]:
    """(8-bit numbers, scales): their product is ``values`` [rows, cols], rounded.

    One scale for all of them, [1, 1], or for each row, [rows, 1]; float32.
    """
    dtype, largest = KINDS[kind]
    wide = values.float()
    most = wide.abs().amax(1 if each_row else (0, 1), keepdim=True)
    scales = (most / largest).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (wide / scales).clamp(-largest, largest)
    return (scaled.round() if kind == "int8" else scaled).to(dtype), scales


def semi_quantized_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    kind: str,
    how: Sequence[int],
) -> Tensor:
    """x: [..., cols] -> act(W x + b): [..., rows]; ``kind``: of KINDS, ``how``: as DEFAULT."""
    return activate(semi_quantized_linear_op(x, packed, bias, rows, kind, how), act)


def semi_quantized_conv2d(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, *how: Any
) -> Tensor:
    """The same over patches; ``how``: kernel, stride, padding, dilation, act, kind, how."""
    *geometry, act, kind, setting = how
    out = semi_quantized_conv2d_op(x, packed, bias, rows, *geometry, kind, setting)
    return activate(out, act)


def _run(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, kind: str, how: Sequence[int]
) -> Tensor:
    scales, packed = _parts(packed, rows, kind)

    def product(flat: Tensor) -> Tensor:
        rounded, scale = quantize(flat, kind)
        out = _sums(rounded, packed, kind, how).float() * (scale * scales)
        return (out if bias is None else out + bias.float()).to(x.dtype)

    return by_rows(x, rows, TOKENS, product)


def _reference(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, kind: str, how: Sequence[int]
) -> Tensor:
    """The same but for the rounding of x, through which no gradient passes."""
    weight = _dense(packed, rows, x.shape[-1], kind)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _sums(rounded: Tensor, packed: Tensor, kind: str, how: Sequence[int]) -> Tensor:
    """[tokens, rows]: the sums of products of 8-bit numbers."""
    if packed.is_cuda:
        return multiply(packed, rounded, None, how, _SUMS[kind])
    exact = torch.float64 if kind == "int8" else torch.float32
    return F.linear(rounded.to(exact), unpack24(packed).to(exact))


def _dense(packed: Tensor, rows: int, cols: int, kind: str) -> Tensor:
    scales, packed = _parts(packed, rows, kind)
    return dense24(packed, rows, cols, _SUMS[kind]).float() * scales[:, None]


def _parts(packed: Tensor, rows: int, kind: str) -> tuple[Tensor, Tensor]:
    """(scales [rows], the packed numbers)."""
    scales, packed = packed[: 4 * rows].view(torch.float32), packed[4 * rows :]
    return scales, packed.view(KINDS[kind][0]).view(rows, -1) if packed.is_cuda else packed


semi_quantized_linear_op = register(
    "semi_quantized_linear",
    "str kind, int[] how",
    {"CPU": _run, "CUDA": _run},
    fake=fake_linear,
    reference=_reference,
)
semi_quantized_conv2d_op = conv_as_linear(
    "semi_quantized_conv2d", semi_quantized_linear_op, "str kind, int[] how"
)
