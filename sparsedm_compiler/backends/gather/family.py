"""The gather kernels as a family: one for shared masks, one for blocks."""

from __future__ import annotations

import torch

from ...patterns import BlockNM, NestedNM, Pattern, SharedNM
from ...triton_support import why_unavailable
from ..cuda.device import find_device, list_triton, why_no_tensor_cores
from ..cuda.im2col import register_conv
from ..cuda.raw_format import RawFormatFamily
from ..kernel_family import KernelConfig, MatmulProblem, OpCall, WeightFormat
from . import format as gather_format
from .ops import SCHEMA, gather_linear_op, list_tiles

ANYWHERE, IN_RUNS = "cuda_gather", "triton_block"

_PLENTY = 227 * 1024  # bytes of shared memory of an H100's block
_HOPPER = 9

gather_conv2d_op = register_conv("gather_conv2d", gather_linear_op, SCHEMA)


class GatherFamily(RawFormatFamily):
    """Kernels for weights of which many rows keep the same columns.

    ``triton_block`` runs blocks of which at least 8 columns lie side by side, ``cuda_gather`` all
    else. Of a pattern within blocks, as in "1:2@64x32+2:4", the blocks alone are skipped. Tile of a
    KernelConfig: as ``ops.Tile``.
    """

    names = (ANYWHERE, IN_RUNS)
    accepts = (SharedNM, BlockNM, NestedNM)
    format = gather_format

    def why_unavailable(self) -> str | None:
        return why_no_tensor_cores(find_device()) or why_unavailable()

    def list_libraries(self) -> dict[str, str | None]:
        return list_triton()

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        device = find_device()
        room, hopper = _PLENTY, True
        if device is not None:
            room, hopper = device.shared_bytes, device.capability[0] == _HOPPER
        layout = gather_format.require_layout(self.require_accepted(pattern))
        name, code = ANYWHERE if layout.run == 1 else IN_RUNS, (gather_format.TYPES.index(dtype),)
        return tuple(
            KernelConfig(name, code, tuple(tile))
            for tile in list_tiles(layout, dtype)
            if tile.shared_bytes(dtype) <= room and (hopper or not tile.swapped)
        )

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        pattern = str(self.require_accepted(weight_format.pattern))
        return problem.choose_op(
            gather_linear_op, gather_conv2d_op, act=problem.act, pattern=pattern, tile=list(tile)
        )
