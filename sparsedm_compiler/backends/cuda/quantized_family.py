"""The base of families that multiply in 8 bits, each row of the weight and of x by its own scale.

A packed weight is one tensor of bytes: ones, the float32 scales of the rows, the 8-bit numbers in
the family's form. W is rounded once, when it is packed, and x in every call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PackError
from ...patterns import Pattern
from ..custom_op import apply_activation, fake_linear
from ..kernel_family import KernelConfig, Op, WeightFormat
from ..weight_matrix import from_matrix, to_matrix
from .device import CudaDevice, why_no_fp8_cores, why_no_tensor_cores
from .family import CudaFamily
from .finish import finish_sums, reference_finish
from .quantize import MOST_COLS, quantize

TYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of weights, inputs and outputs."""
_ERRORS = {"fp8": "4 %", "int8": "1 %"}
"""||out - exact|| / ||exact|| of a layer of normally distributed numbers."""
_HEAD = 128  # bytes of ones, which keep what follows aligned

ComputeSums = Callable[[Tensor, Tensor], Tensor]
"""(8-bit numbers of x, those of W in bytes) -> sums of products [tokens, rows], not scaled."""


class QuantizedRowsFamily(CudaFamily):
    """Kernels in one of ``quantize.KINDS``, for any floating dtype.

    It declares no ``token_multiple``: rows are padded as they are rounded.
    """

    def __init__(self, kind: str, name: str) -> None:
        """Makes the family of one of KINDS, with one kernel of that name."""
        self.kind = kind
        self.names = (name,)
        self.inexact = (
            f"quantizes the weight and its inputs to 8 bits, about {_ERRORS[kind]} of the output"
        )

    def _refuse(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        if dtype not in TYPES:
            return f"no 8-bit kernel for {str(dtype).removeprefix('torch.')}"
        if cols > MOST_COLS:
            return f"{cols} columns are more than the {MOST_COLS} that are quantized at once"
        return self._refuse_size(pattern, rows, cols)

    @abstractmethod
    def _refuse_size(self, pattern: Pattern, rows: int, cols: int) -> str | None:
        """Returns why a weight of that size cannot be packed; None if it can."""

    @abstractmethod
    def _pack_numbers(self, rounded: Tensor, mask: Tensor) -> Tensor:
        """Returns the rounded, masked matrix in the form of the kernels."""

    @abstractmethod
    def _unpack_numbers(self, numbers: Tensor, rows: int, cols: int) -> Tensor:
        """Returns the rounded matrix in float32 of what ``_pack_numbers`` gave, as bytes."""

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        values, mask = to_matrix(weight.detach()), to_matrix(mask)
        rows, cols = values.shape
        reason = self.why_refused(pattern, rows, cols, values.dtype)
        if reason is not None:
            raise PackError(f"a weight of {list(weight.shape)} cannot be packed: {reason}")
        rounded, scales = quantize(values, self.kind)
        head = torch.ones(_HEAD // 4, dtype=torch.float32, device=values.device)
        numbers = self._pack_numbers(rounded, mask).view(torch.uint8).flatten()
        return torch.cat((head.view(torch.uint8), scales.flatten().view(torch.uint8), numbers))

    def unpack(self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat) -> Tensor:
        """Returns the dequantized weight in float32; the original values are not recoverable."""
        rows, cols = to_matrix(torch.empty(shape, device="meta")).shape
        _, scales, numbers = split_packed(packed, rows)
        dense = self._unpack_numbers(numbers, rows, cols) * scales[:, None]
        return from_matrix(dense, shape[2:])

    def check(
        self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat
    ) -> torch.dtype:
        raise PackError(f"no file holds weights packed for {self.names[0]}: it {self.inexact}")


def why_no_cores(kind: str, device: CudaDevice | None) -> str | None:
    """Returns why no tensor cores for a kind can be used, as a sentence; None if they can."""
    return (why_no_fp8_cores if kind == "fp8" else why_no_tensor_cores)(device)


def split_packed(packed: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (a one, the scales [rows], the numbers as bytes) of a packed weight."""
    one = packed[:4].view(torch.float32)
    scales = packed[_HEAD : _HEAD + 4 * rows].view(torch.float32)
    return one, scales, packed[_HEAD + 4 * rows :]


def multiply_in_8_bits(
    x: Tensor,
    rounded: tuple[Tensor, Tensor],
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    compute_sums: ComputeSums,
) -> Tensor:
    """Returns act(W x + b), [..., rows]: sums of products are scaled, biased and activated.

    x: [..., cols]; tells shape and dtype of the result. rounded: (numbers, factors) of its rows.
    """
    out = x.new_empty(*x.shape[:-1], rows)
    if out.numel():
        numbers, factors = rounded
        _, scales, weight = split_packed(packed, rows)
        sums = compute_sums(numbers, weight)
        plain = None if bias is None else bias.contiguous()
        finish = finish_sums if x.is_cuda else reference_finish
        finish(sums, (factors, scales), plain, act, out.view(-1, rows))
    return out


def differentiate_in_8_bits(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Returns the same but for the rounding of x, through which no gradient passes.

    weight: as ``unpack`` returns it.
    """
    out = F.linear(x.float(), weight, None if bias is None else bias.float())
    return apply_activation(out, act).to(x.dtype)


def register_rounded(name: str, arguments: str, multiply: Op) -> Op:
    """Registers the op ``sparsedm::name`` on rows that are rounded already; it has no gradient.

    Args:
        name: Name of the op in the namespace "sparsedm".
        arguments: Schema of its last arguments.
        multiply: Runs it on every device, as ``kernel_family.RowRounding.multiply``.

    Returns:
        The op (x, numbers, factors, packed, bias, rows, ``arguments``) -> [..., rows].
    """
    tensors = "Tensor x, Tensor numbers, Tensor factors, Tensor packed, Tensor? bias, int rows"
    torch.library.define(f"sparsedm::{name}", f"({tensors}, {arguments}) -> Tensor")
    torch.library.impl(f"sparsedm::{name}", ("cpu", "cuda"), multiply)

    def fake(x: Tensor, numbers: Tensor, factors: Tensor, *rest: Any) -> Tensor:
        return fake_linear(x, *rest[:3])

    torch.library.register_fake(f"sparsedm::{name}", fake)
    op: Op = getattr(torch.ops.sparsedm, name).default
    return op
