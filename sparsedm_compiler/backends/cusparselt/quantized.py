"""2:4 in 8 bits as a family, by cuSPARSELt."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ...patterns import Pattern
from ...triton_support import why_unavailable
from ..cuda.device import (
    find_device,
    list_cusparselt,
    list_triton,
    note_cusparselt,
    why_no_cusparselt,
)
from ..cuda.quantize import KINDS, round_rows
from ..cuda.quantized_family import QuantizedRowsFamily, why_no_cores
from ..kernel_family import KernelConfig, MatmulProblem, Op, OpCall, WeightFormat
from ..row_rounding import RowRounding
from .algorithms import find_algorithms
from .family import KINDS as PATTERN_KINDS
from .family import why_misfit
from .format import pack24
from .ops import DEFAULT, CuSparseLtSetting
from .quantized_ops import (
    multiply_rounded,
    semi_quantized_conv2d_op,
    semi_quantized_linear_op,
    unpack_numbers,
)

_MULTIPLE = 32


class QuantizedFamily(QuantizedRowsFamily):
    """One kernel for masks of at most 2 in every aligned 4 columns.

    The packed numbers are what ``torch._cslt_compress`` gives for the rounded weight; on the CPU,
    as ``pack24`` gives it. Tile of a KernelConfig: as CuSparseLtSetting.
    """

    accepts = PATTERN_KINDS
    rounding_ops: Mapping[Op, RowRounding] = MappingProxyType(
        {semi_quantized_linear_op: RowRounding(round_rows, multiply_rounded)}
    )

    def __init__(self, kind: str) -> None:
        """Makes the family of one of KINDS."""
        super().__init__(kind, f"cuda_semi_{kind}")

    def why_unavailable(self) -> str | None:
        device = find_device()
        return why_no_cores(self.kind, device) or why_no_cusparselt(device) or why_unavailable()

    def describe_doubts(self) -> str | None:
        return note_cusparselt(find_device())

    def list_libraries(self) -> dict[str, str | None]:
        return {**list_cusparselt(), **list_triton()}

    def _refuse_size(self, pattern: Pattern, rows: int, cols: int) -> str | None:
        return why_misfit(pattern, rows, cols, _MULTIPLE)

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        """Returns the algorithms that run here; only running one tells which sizes it takes."""
        _, *split = DEFAULT
        return tuple(
            KernelConfig(self.names[0], (), (algorithm, *split))
            for algorithm in find_algorithms(KINDS[self.kind][0])
        )

    def _pack_numbers(self, rounded: Tensor, mask: Tensor) -> Tensor:
        return torch._cslt_compress(rounded) if rounded.is_cuda else pack24(rounded, mask)

    def _unpack_numbers(self, numbers: Tensor, rows: int, cols: int) -> Tensor:
        return unpack_numbers(numbers, rows, cols, self.kind)

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        ops = semi_quantized_linear_op, semi_quantized_conv2d_op
        setting = CuSparseLtSetting(*tile)._asdict()
        return problem.choose_op(*ops, act=problem.act, kind=self.kind, **setting)
