"""The kernels on Hopper's own tensor-core instructions as two families: by kind of pattern."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from ...patterns import NM, VNM, BlockNM, NestedNM, Pattern, SharedNM, TransposableNM
from ...triton_support import why_unavailable as why_no_triton
from ..cuda.device import CudaDevice, find_device, why_no_nvrtc
from ..cuda.nvrtc import list_nvrtc, why_unavailable
from ..cuda.raw_format import RawFormatFamily
from ..kernel_family import KernelConfig, MatmulProblem, OpCall, WeightFormat
from . import format as wgmma_format
from .build import Tile, build_ahead
from .ops import wgmma_conv2d_op, wgmma_linear_op
from .training import find_blocks_op, list_builds, multiply_blocks
from .transposed import why_dense_gradient

BLOCKS, SEMI = "cuda_block", "cuda_semi_wgmma"
TILES = (
    Tile(128, 3),
    Tile(128, 3, raster=8),
    Tile(128, 3, slices=4, raster=8),
    Tile(96, 3),
    Tile(192, 2),
    Tile(192, 2, slices=3, raster=8),
    Tile(128, 2),
    Tile(128, 2, slices=2),
    Tile(64, 2),
    Tile(128, 1, slices=1),
)
"""Large ones for large products; measured to be enough on an H100 (docs/results)."""

_HOPPER = (9, 0)
_PLENTY = 227 * 1024  # bytes of shared memory of an H100's block


class WgmmaFamily(RawFormatFamily):
    """The base of both, in half precision.

    Tile of a KernelConfig: as ``build.Tile``.
    """

    format = wgmma_format

    def why_unavailable(self) -> str | None:
        device = find_device()
        return why_no_nvrtc(device) or _why_other(device) or why_unavailable()

    def list_libraries(self) -> dict[str, str | None]:
        return list_nvrtc()

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        device, accepted = find_device(), self.require_accepted(pattern)
        room = _PLENTY if device is None else device.shared_bytes
        layout = wgmma_format.choose_layout(accepted, wgmma_format.ROWS, wgmma_format.ROWS)
        code = (wgmma_format.TYPES.index(dtype),)
        return tuple(
            KernelConfig(self.names[0], code, (tile.tokens, tile.groups, tile.slices, tile.raster))
            for tile in TILES
            if tile.count_stages(layout, room)
        )

    def prepare(
        self,
        kernels: Sequence[KernelConfig],
        pattern: Pattern,
        problems: Sequence[MatmulProblem],
        shape: tuple[int, int],
    ) -> None:
        device = find_device()
        if device is not None:
            layout = wgmma_format.choose_layout(self.require_accepted(pattern), *shape)
            tiles = {Tile(*kernel.tile) for kernel in kernels}
            pairs = {(problem.dtype, problem.act) for problem in problems}
            build_ahead(((layout, tile, *pair) for tile in tiles for pair in pairs), device)

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        pattern = str(self.require_accepted(weight_format.pattern))
        return problem.choose_op(
            wgmma_linear_op, wgmma_conv2d_op, act=problem.act, pattern=pattern, tile=list(tile)
        )


class BlockFamily(WgmmaFamily):
    """A kernel for blocks of weights, dense or with 2:4 within, that skips the others."""

    names = (BLOCKS,)
    accepts = (BlockNM, NestedNM)
    training_op = staticmethod(multiply_blocks)
    layout_op = find_blocks_op

    def why_refused_in_training(
        self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype
    ) -> str | None:
        if isinstance(pattern, NestedNM):
            return f"{BLOCKS} does not run in training with N:M within blocks, as {pattern} has it"
        by_triton = why_no_triton() if torch.cuda.is_available() else None
        return by_triton or self.why_refused(pattern, rows, cols, dtype)

    def prepare_training(
        self, uses: Sequence[tuple[Pattern, MatmulProblem, tuple[int, int]]]
    ) -> None:
        device = find_device()
        if device is not None:
            build_ahead(chain.from_iterable(list_builds(*use) for use in uses), device)

    def describe_backward(self, pattern: Pattern, *, frozen: bool) -> str:
        accepted = self.require_accepted(pattern)
        assert isinstance(accepted, BlockNM)
        dense = why_dense_gradient(accepted)
        notes = [] if dense is None else [f"the gradient of x is dense: {dense}"]
        if not frozen:
            notes.append("the gradient of the weight is dense until freeze_masks")
        return "; ".join(notes)


class SemiFamily(WgmmaFamily):
    """A kernel for at most 2 of every 4 columns, as cuSPARSELt's are."""

    names = (SEMI,)
    accepts = (NM, SharedNM, VNM, TransposableNM)


def _why_other(device: CudaDevice | None) -> str | None:
    """Returns why a device that is there is not a Hopper one, as a sentence; None if it is."""
    if device is None or device.capability[0] == _HOPPER[0]:
        return None
    version = ".".join(map(str, device.capability))
    return f"no wgmma: {device.name} has compute capability {version}, 9.0 is needed"
