"""The V:n:m kernels as a family."""

from __future__ import annotations

from typing import Any

import torch

from ...patterns import Pattern
from ..cuda.device import card, machine, no_nvrtc, no_tensor_cores
from ..cuda.im2col import conv_as_linear, linear_or_conv
from ..cuda.nvrtc import unavailable
from ..cuda.raw_format import BareFamily
from ..kernel_family import KernelConfig, MatmulProblem, OpCall, WeightFormat
from . import format as vnm_format
from .launch import Tile, version
from .ops import How, vnm_linear_op, warp_rows

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

vnm_conv2d_op = conv_as_linear("vnm_conv2d", vnm_linear_op, "str act, int[] how")


class VnmFamily(BareFamily):
    """Kernels for V:n:m weights in half precision.

    Tile of a Kernel: (tokens of a warp, warps over rows, warps over tokens, stages).
    """

    device = "cuda"
    names = ("cuda_vnm",)
    format = vnm_format

    def unavailable(self) -> str | None:
        here = card()
        return no_tensor_cores(here) or no_nvrtc(here) or unavailable()

    def candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        here, layout = card(), (vnm_format.TYPES.index(dtype),)
        room = _PLENTY if here is None else here.shared_bytes
        found = []
        for tile in TILES:
            stages = deepest(pattern, tile, room)
            if stages:
                found.append(KernelConfig("cuda_vnm", layout, (*tile, stages)))
        return tuple(found)

    def call(self, work: MatmulProblem, form: WeightFormat, tile: tuple[int, ...]) -> OpCall:
        pattern = form.pattern
        how = [*How(pattern.n, pattern.m, pattern.height, *tile)]
        return linear_or_conv(vnm_linear_op, vnm_conv2d_op, work, work.act, how)

    def machine(self) -> tuple[Any, ...]:
        return *machine(), version()


def deepest(pattern: Pattern, tile: tuple[int, int, int], room: int) -> int:
    """The most stages of which a tile fits into ``room`` bytes of shared memory; 0 if none does."""
    sizes = {deep: Tile(warp_rows(pattern.height), *tile, deep) for deep in _STAGES}
    return next((deep for deep, each in sizes.items() if each.shared(pattern.m) <= room), 0)
