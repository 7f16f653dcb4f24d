"""Dense products in e4m3 as a family: what 8-bit kernels for sparse weights have to beat."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ...patterns import NM, VNM, BlockNM, NestedNM, Pattern, SharedNM, TransposableNM
from ...triton_support import why_unavailable
from ..cuda.device import find_device, list_triton
from ..cuda.quantize import round_rows
from ..cuda.quantized_family import QuantizedRowsFamily, why_no_cores
from ..kernel_family import KernelConfig, MatmulProblem, Op, OpCall, WeightFormat
from ..row_rounding import RowRounding
from .ops import fp8_conv2d_op, fp8_linear_op, multiply_rounded

_KIND, _MULTIPLE = "fp8", 16


class Fp8Family(QuantizedRowsFamily):
    """One kernel for masks of any pattern, whose zeros it multiplies like all else.

    Tile of a KernelConfig: (scaled,) as in ``ops``. The packed numbers are the matrix in e4m3.
    """

    accepts = (NM, SharedNM, VNM, TransposableNM, BlockNM, NestedNM)
    rounding_ops: Mapping[Op, RowRounding] = MappingProxyType(
        {fp8_linear_op: RowRounding(round_rows, multiply_rounded)}
    )

    def __init__(self) -> None:
        """Makes the family."""
        super().__init__(_KIND, "cuda_fp8")

    def why_unavailable(self) -> str | None:
        return why_no_cores(_KIND, find_device()) or why_unavailable()

    def list_libraries(self) -> dict[str, str | None]:
        return {"CUDA of torch": torch.version.cuda, **list_triton()}

    def _refuse_size(self, pattern: Pattern, rows: int, cols: int) -> str | None:
        for size, dimension in ((rows, "rows"), (cols, "columns")):
            if size % _MULTIPLE:
                return f"{size} {dimension} are not a multiple of {_MULTIPLE}, as cuBLASLt wants"
        return None

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        ways = (1, 0) if dtype is torch.bfloat16 else (0,)
        return tuple(KernelConfig(self.names[0], (), (scaled,)) for scaled in ways)

    def _pack_numbers(self, rounded: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, rounded.float(), 0).to(rounded.dtype)

    def _unpack_numbers(self, numbers: Tensor, rows: int, cols: int) -> Tensor:
        return numbers.view(torch.float8_e4m3fn).view(rows, cols).float()

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        (scaled,) = tile
        ops = fp8_linear_op, fp8_conv2d_op
        return problem.choose_op(*ops, act=problem.act, kind=_KIND, scaled=scaled)
