"""Free 2:4 weights on NVIDIA's sparse tensor cores, by cuSPARSELt."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import PackError
from ...patterns import Pattern
from ..cuda.device import card, machine, no_cusparselt, no_tensor_cores
from ..cuda.im2col import linear_or_conv
from ..kernel_family import KernelConfig, KernelFamily, MatmulProblem, OpCall, WeightFormat
from ..weight_matrix import from_matrix, matrix
from .format import GROUP, KEPT, excess, pack24, stated24
from .ops import DEFAULT, dense24, semi_conv2d, semi_linear

TYPES = (torch.float16, torch.bfloat16)
_MULTIPLE = 16


class SemiFamily(KernelFamily):
    """Kernels for masks of at most 2 in every aligned 4 columns, in float16 and bfloat16.

    Layout of a Kernel: (). Tile: as DEFAULT, an algorithm of the library with its split of K. A
    packed weight is what ``torch._cslt_compress`` gives; on the CPU, as ``pack24`` gives it. NaN
    and Inf cannot come up in a weight (masks refuse them); in the input they spread over the
    outputs that multiply them, not over those whose weight was pruned, as they would in dense.
    """

    device = "cuda"
    names: tuple[str, ...] = ("cuda_semi",)
    opaque = True

    def unavailable(self) -> str | None:
        here = card()
        return no_tensor_cores(here) or no_cusparselt(here)

    def refusal(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        if dtype not in TYPES:
            plain = str(dtype).removeprefix("torch.")
            return f"no 2:4 kernel for {plain}: sparse tensor cores take float16 and bfloat16"
        return misfit(pattern, rows, cols, _MULTIPLE)

    def candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        """Every algorithm of the library; which ids run which sizes, only running them tells."""
        _, *split = DEFAULT
        return tuple(KernelConfig(self.names[0], (), (i, *split)) for i in range(algorithms(dtype)))

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        values, mask = rows_by_cols(weight, mask, pattern, self)
        return torch._cslt_compress(values) if values.is_cuda else pack24(values, mask)

    def unpack(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> Tensor:
        return from_matrix(dense24(packed, shape[0], math.prod(shape[1:])), shape[2:])

    def check(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> torch.dtype:
        dtype, rows, cols = stated24(packed)
        if (rows, rows * cols) != (shape[0], math.prod(shape)):
            raise PackError(f"it is packed as {rows} x {cols}, not {shape}")
        return dtype

    def portable(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> Tensor:
        if not packed.is_cuda:
            return packed
        dense = matrix(self.unpack(packed, shape, form))
        return pack24(dense, dense != 0)

    def call(self, work: MatmulProblem, form: WeightFormat, tile: tuple[int, ...]) -> OpCall:
        return linear_or_conv(semi_linear, semi_conv2d, work, work.act, list(tile))

    def machine(self) -> tuple[Any, ...]:
        return machine()


def rows_by_cols(
    weight: Tensor, mask: Tensor, pattern: Pattern, family: KernelFamily
) -> tuple[Tensor, Tensor]:
    """(weight, mask) as matrices. Raises PackError where they are not what the family packs."""
    values, mask = matrix(weight.detach()), matrix(mask)
    rows, cols = values.shape
    why = family.refusal(pattern, rows, cols, values.dtype) or excess(mask)
    if why is not None:
        raise PackError(f"a weight of {list(weight.shape)} cannot be packed to 2:4: {why}")
    return values, mask


def misfit(pattern: Pattern, rows: int, cols: int, multiple: int) -> str | None:
    """Why a weight of that size and pattern is none for sparse tensor cores, as a sentence."""
    most = pattern.most_kept(GROUP)
    if most > KEPT:
        return (
            f"{pattern} keeps up to {most} of {GROUP} columns, which sparse tensor cores cannot "
            f"run: they take {KEPT}"
        )
    for size, what in ((rows, "rows"), (cols, "columns")):
        if size % multiple:
            return f"{size} {what} are not a multiple of {multiple}, as cuSPARSELt wants"
    return None


@cache
def algorithms(dtype: torch.dtype) -> int:
    """How many algorithms cuSPARSELt has for a dtype here, by a search of a small product."""
    if card() is None:
        return 1
    one = torch.zeros(128, 128, dtype=dtype, device="cuda")
    search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
    *_, count = search(torch._cslt_compress(one), one.t(), None, None, None, True)
    return max(1, int(count))
