"""The gather kernels as a family."""

from __future__ import annotations

import torch

from ...optional_deps import read_version
from ...patterns import Pattern, SharedNM
from ...triton_support import why_unavailable
from ..cuda.device import find_device, why_no_tensor_cores
from ..cuda.im2col import register_conv
from ..cuda.raw_format import RawFormatFamily
from ..kernel_family import KernelConfig, MatmulProblem, OpCall, WeightFormat
from . import ops
from .ops import SCHEMA, gather_linear_op

gather_conv2d_op = register_conv("gather_conv2d", gather_linear_op, SCHEMA)


class GatherFamily(RawFormatFamily):
    """Kernels for weights of which many rows share a mask.

    Tile of a KernelConfig: as ``ops.list_tiles`` gives it.
    """

    names = ("cuda_gather",)
    accepts = (SharedNM,)
    format = ops

    def why_unavailable(self) -> str | None:
        return why_no_tensor_cores(find_device()) or why_unavailable()

    def list_libraries(self) -> dict[str, str | None]:
        names = ("triton", "pytorch-triton", "triton-windows")
        return {"Triton": next(filter(None, map(read_version, names)), None)}

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        layout = (ops.TYPES.index(dtype),)
        tiles = ops.list_tiles(self.require_accepted(pattern), dtype)
        return tuple(KernelConfig("cuda_gather", layout, tile) for tile in tiles)

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        pattern = self.require_accepted(weight_format.pattern)
        return problem.choose_op(
            gather_linear_op,
            gather_conv2d_op,
            act=problem.act,
            n=pattern.n,
            m=pattern.m,
            rows_per_mask=pattern.height,
            tile=list(tile),
        )
