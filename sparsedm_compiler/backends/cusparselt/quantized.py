"""The custom op ``sparsedm::semi_quantized_linear``: 2:4 in 8 bits, by cuSPARSELt.

W is rounded once, each row by its own scale; x in every call, by one scale of all its values. The
products are summed exactly (int8) or in float32 (e4m3), scaled, and rounded to the dtype of x. So
one NaN or Inf in x spreads over all outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PackError
from ...patterns import Pattern
from ..cuda.device import (
    find_device,
    list_cusparselt,
    note_cusparselt,
    why_no_cusparselt,
    why_no_fp8_cores,
    why_no_tensor_cores,
)
from ..cuda.family import CudaFamily
from ..cuda.im2col import register_conv
from ..cuda.token_padding import apply_to_tokens
from ..custom_op import apply_activation, fake_linear, register
from ..kernel_family import KernelConfig, MatmulProblem, OpCall, WeightFormat
from ..weight_matrix import from_matrix, to_matrix
from .family import KINDS as PATTERN_KINDS
from .family import check_matrices, why_misfit
from .format import pack24, unpack24
from .ops import DEFAULT, SETTING_SCHEMA, CuSparseLtSetting, multiply, to_dense

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The dtype and its largest number, by name."""
TOKENS = 16
"""cuSPARSELt wants a multiple of this number of tokens in 8-bit types."""
TYPES = (torch.float16, torch.bfloat16, torch.float32)
_MULTIPLE = 32
# The library scales 8-bit products by one number that torch reads back from the GPU (which no CUDA
# graph can hold) or by a vector, which not all versions take. So it gives the bare sums.
_SUMS = {"int8": torch.int32, "fp8": torch.float32}


class QuantizedFamily(CudaFamily):
    """One kernel for masks of at most 2 in every aligned 4 columns, for any floating dtype.

    A packed weight is one tensor of bytes: the float32 scales of the rows, then what
    ``torch._cslt_compress`` gives for the rounded weight; on the CPU, as ``pack24`` gives it. It
    declares no ``token_multiple``: rows of padding would take part in the scale of x.
    """

    accepts = PATTERN_KINDS
    inexact = "quantizes the weight and its inputs to 8 bits"

    def __init__(self, kind: str) -> None:
        """Makes the family of one of KINDS."""
        self.kind = kind
        self.names = (f"cuda_semi_{kind}",)

    def why_unavailable(self) -> str | None:
        device = find_device()
        lacks_cores = why_no_fp8_cores if self.kind == "fp8" else why_no_tensor_cores
        return lacks_cores(device) or why_no_cusparselt(device)

    def describe_doubts(self) -> str | None:
        return note_cusparselt(find_device())

    def list_libraries(self) -> dict[str, str | None]:
        return list_cusparselt()

    def _refuse(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        if dtype not in TYPES:
            return f"no 8-bit 2:4 kernel for {str(dtype).removeprefix('torch.')}"
        return why_misfit(pattern, rows, cols, _MULTIPLE)

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        return (KernelConfig(self.names[0], (), DEFAULT),)

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        values, mask = check_matrices(weight, mask, pattern, self)
        rounded, scales = quantize(values, self.kind, per_row=True)
        packed = torch._cslt_compress(rounded) if values.is_cuda else pack24(rounded, mask)
        return torch.cat((scales.flatten().view(torch.uint8), packed.view(torch.uint8).flatten()))

    def unpack(self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat) -> Tensor:
        """Returns the dequantized weight in float32; the original values are not recoverable."""
        cols = to_matrix(torch.empty(shape, device="meta")).shape[1]
        return from_matrix(_dequantize(packed, shape[0], cols, self.kind), shape[2:])

    def check(
        self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat
    ) -> torch.dtype:
        raise PackError(f"no file holds weights packed for {self.names[0]}: it {self.inexact}")

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        ops = semi_quantized_linear, semi_quantized_conv2d
        setting = CuSparseLtSetting(*tile)._asdict()
        return problem.choose_op(*ops, act=problem.act, kind=self.kind, **setting)


def quantize(values: Tensor, kind: str, *, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """Returns (8-bit numbers, scales) whose product is ``values`` [rows, cols], rounded.

    One scale for all of them, [1, 1], or one per row, [rows, 1]; float32.
    """
    dtype, largest = KINDS[kind]
    wide = values.float()
    most = wide.abs().amax(1 if per_row else (0, 1), keepdim=True)
    scales = (most * (1 / largest)).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (wide / scales).clamp(-largest, largest)
    return (scaled.round() if kind == "int8" else scaled).to(dtype), scales


def semi_quantized_linear(
    x: Tensor,
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
    """Returns act(W x + b): x [..., cols] -> [..., rows]; kind: one of KINDS."""
    setting = algorithm, split_k, split_k_mode
    return apply_activation(semi_quantized_linear_op(x, packed, bias, rows, kind, *setting), act)


def semi_quantized_conv2d(
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
    kind: str,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    """Returns act(W * x + b), a conv2d: [N, C, H, W] -> [N, rows, H', W']; kind: one of KINDS."""
    geometry, setting = (kernel, stride, padding, dilation), (algorithm, split_k, split_k_mode)
    out = semi_quantized_conv2d_op(x, packed, bias, rows, *geometry, kind, *setting)
    return apply_activation(out, act)


def _run(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    kind: str,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    scales, packed = _split_packed(packed, rows, kind)
    setting = CuSparseLtSetting(algorithm, split_k, split_k_mode)

    def compute_product(flat: Tensor) -> Tensor:
        rounded, scale = quantize(flat, kind)
        out = _compute_sums(rounded, packed, kind, setting).float() * (scale * scales)
        return (out if bias is None else out + bias.float()).to(x.dtype)

    return apply_to_tokens(x, rows, TOKENS, compute_product)


def _reference(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    kind: str,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    """Returns the same but for the rounding of x, through which no gradient passes."""
    weight = _dequantize(packed, rows, x.shape[-1], kind)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _compute_sums(rounded: Tensor, packed: Tensor, kind: str, setting: CuSparseLtSetting) -> Tensor:
    """Returns [tokens, rows]: the sums of products of 8-bit numbers."""
    if packed.is_cuda:
        return multiply(packed, rounded, None, setting, _SUMS[kind])
    exact = torch.float64 if kind == "int8" else torch.float32
    return F.linear(rounded.to(exact), unpack24(packed).to(exact))


def _dequantize(packed: Tensor, rows: int, cols: int, kind: str) -> Tensor:
    scales, packed = _split_packed(packed, rows, kind)
    return to_dense(packed, rows, cols, _SUMS[kind]).float() * scales[:, None]


def _split_packed(packed: Tensor, rows: int, kind: str) -> tuple[Tensor, Tensor]:
    """Returns (scales [rows], the packed numbers)."""
    scales, packed = packed[: 4 * rows].view(torch.float32), packed[4 * rows :]
    return scales, packed.view(KINDS[kind][0]).view(rows, -1) if packed.is_cuda else packed


_SCHEMA = f"str kind, {SETTING_SCHEMA}"
semi_quantized_linear_op = register(
    "semi_quantized_linear",
    _SCHEMA,
    {"CPU": _run, "CUDA": _run},
    fake=fake_linear,
    reference=_reference,
)
semi_quantized_conv2d_op = register_conv("semi_quantized_conv2d", semi_quantized_linear_op, _SCHEMA)
