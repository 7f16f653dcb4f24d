"""The V:n:m kernels as a family."""

from __future__ import annotations

import torch

from ...patterns import VNM, Pattern
from ..cuda.device import find_device, why_no_nvrtc, why_no_tensor_cores
from ..cuda.im2col import register_conv
from ..cuda.nvrtc import list_nvrtc, why_unavailable
from ..cuda.raw_format import RawFormatFamily
from ..kernel_family import KernelConfig, MatmulProblem, OpCall, WeightFormat
from . import format as vnm_format
from .launch import Tile
from .ops import SCHEMA, count_warp_rows, vnm_linear_op

TILES = (
    (64, 4, 2),
    (64, 2, 4),
    (64, 2, 2),
    (32, 4, 2),
    (32, 2, 2),
    (32, 4, 1),
)
"""(tokens of a warp, warps over rows, warps over tokens): large ones for large products."""

_STAGES = (4, 3, 2)
_PLENTY = 227 * 1024  # bytes of shared memory of an H100's block

vnm_conv2d_op = register_conv("vnm_conv2d", vnm_linear_op, SCHEMA)


class VnmFamily(RawFormatFamily):
    """Kernels for V:n:m weights in half precision.

    Tile of a KernelConfig: (tokens of a warp, warps over rows, warps over tokens, stages).
    """

    names = ("cuda_vnm",)
    accepts = (VNM,)
    format = vnm_format
    feature_major_op = vnm_linear_op

    def why_unavailable(self) -> str | None:
        device = find_device()
        return why_no_tensor_cores(device) or why_no_nvrtc(device) or why_unavailable()

    def list_libraries(self) -> dict[str, str | None]:
        return list_nvrtc()

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        device, layout = find_device(), (vnm_format.TYPES.index(dtype),)
        room = _PLENTY if device is None else device.shared_bytes
        accepted = self.require_accepted(pattern)
        stages = {tile: find_most_stages(accepted, tile, room) for tile in TILES}
        return tuple(
            KernelConfig("cuda_vnm", layout, (*tile, count))
            for tile, count in stages.items()
            if count
        )

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        pattern = self.require_accepted(weight_format.pattern)
        return problem.choose_op(
            vnm_linear_op,
            vnm_conv2d_op,
            act=problem.act,
            n=pattern.n,
            m=pattern.m,
            rows_per_block=pattern.height,
            tile=list(tile),
            feature_major=False,
        )


def find_most_stages(pattern: Pattern, tile: tuple[int, int, int], room: int) -> int:
    """Returns the most stages with which a tile fits into ``room`` bytes of shared memory, or 0."""
    warp_rows = count_warp_rows(pattern.height)
    sizes = {
        stages: Tile(warp_rows, *tile, stages).count_shared_bytes(pattern.m) for stages in _STAGES
    }
    return next((stages for stages, size in sizes.items() if size <= room), 0)
