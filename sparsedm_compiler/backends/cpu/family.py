"""The CPU kernels as a family."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...errors import PackError
from ...patterns import NM, BlockNM, Pattern, SharedNM
from ..cpp_compiler import describe_compiler
from ..kernel_family import KernelConfig, KernelFamily, MatmulProblem, OpCall, WeightFormat
from ..processor import read_cpu_name
from .build import hash_sources, why_unavailable
from .format import BLOCKS, DEPTH, NARROW, UNIT, WIDE, check, find_widest, read_layout, why_refused
from .isa import multiplies_blocks, read_isa, select_isa
from .norm_conv import nm_norm_conv2d_op
from .ops import nm_conv2d_op, nm_linear_op, unpack_weight
from .pack import pack

_Settings = tuple[tuple[int, int], ...]
"""(columns of a block, vectors of tokens) of each kernel to try."""
_LEVELS = (0.4, 0.2, 0.1)
"""Densities at which masks that are free per row get other settings."""
# Of 16 registers a tile fills the most that it can, of 32 as many as loads keep up with.
_FREE_OF_16: tuple[_Settings, ...] = (
    ((64, 6), (96, 6), (128, 6)),
    ((96, 6), (128, 6)),
    ((128, 6), (192, 6)),
    ((192, 6), (256, 6)),
)
_SHARED_OF_16: _Settings = ((128, 6), (192, 6), (256, 4), (512, 5))
_FREE: dict[str, tuple[_Settings, ...]] = {
    "avx512": (
        ((64, 6), (64, 9), (96, 5)),
        ((96, 5), (96, 6), (128, 5)),
        ((128, 5), (192, 4)),
        ((128, 5), (192, 5), (256, 4)),
    ),
    "neon": tuple(tuple((width, 12) for width, _ in level) for level in _FREE_OF_16),
}
_SHARED: dict[str, _Settings] = {
    "avx512": ((128, 6), (192, 6), (512, 4), (512, 5)),
    "neon": ((192, 6), (512, 5), (512, 6)),
}


class CpuFamily(KernelFamily):
    """Kernels for per-row masks and shared masks, and in bfloat16 widely shared ones and blocks.

    Layout of a KernelConfig: (columns of a block; NARROW, WIDE or BLOCKS). Tile: (vectors of
    tokens), which BLOCKS does without.
    """

    device = "cpu"
    names = ("cpu_free", "cpu_shared", "cpu_wide", "cpu_block")
    accepts = (NM, SharedNM)
    norm_ops = MappingProxyType({nm_conv2d_op: nm_norm_conv2d_op})
    call_ms = 0.015  # its Python, cold: benchmarks/call_cost.py

    def why_unavailable(self) -> str | None:
        return why_unavailable()

    def list_libraries(self) -> dict[str, str | None]:
        """Returns the compiler, and the ISA of all kernels and of those in bfloat16."""
        return {
            "C++ compiler": describe_compiler(),
            "CPU ISA": torch.backends.cpu.get_cpu_capability(),
            "CPU bfloat16 ISA": select_isa(),
        }

    def _refuse(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        return why_refused(self.require_accepted(pattern), rows, cols, dtype)

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        """Returns the kernels in the settings that won somewhere (benchmarks/sparse.py)."""
        accepted = self.require_accepted(pattern)
        if isinstance(accepted, SharedNM):
            wide = dtype == torch.bfloat16 and accepted.rows % UNIT == 0 and select_isa() != "plain"
            blocks = wide and _has_deep_blocks(pattern) and multiplies_blocks()
            return (
                *(
                    [KernelConfig("cpu_block", (find_widest(accepted), BLOCKS), (1,))]
                    if blocks
                    else []
                ),
                *(KernelConfig("cpu_wide", (2048, WIDE), (tile,)) for tile in (3, 6) if wide),
                *_list_settings("cpu_shared", _SHARED.get(read_isa(), _SHARED_OF_16)),
            )
        level = sum(accepted.density < bound for bound in _LEVELS)
        return _list_settings("cpu_free", _FREE.get(read_isa(), _FREE_OF_16)[level])

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        width, wide = kernel.layout
        accepted = self.require_accepted(pattern)
        return pack(weight, mask, accepted, width=width, wide=wide)

    def unpack(self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat) -> Tensor:
        return unpack_weight(packed, shape[2:])

    def check(
        self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat
    ) -> torch.dtype:
        check(packed)
        layout = read_layout(packed)
        if (layout.rows, layout.rows * layout.cols) != (shape[0], math.prod(shape)):
            raise PackError(f"it is packed as {layout.rows} x {layout.cols}, not {shape}")
        return layout.dtype

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        (vectors,) = tile
        return problem.choose_op(nm_linear_op, nm_conv2d_op, act=problem.act, tile=vectors)

    def describe_machine(self) -> tuple[Any, ...]:
        capability = torch.backends.cpu.get_cpu_capability()
        sources, isa, threads = hash_sources(), select_isa(), torch.get_num_threads()
        return read_cpu_name(), torch.__version__, sources, isa, threads, capability


def _has_deep_blocks(pattern: Pattern) -> bool:
    """Returns whether whole blocks of a multiple of DEPTH columns are kept."""
    return isinstance(pattern, BlockNM) and pattern.columns % DEPTH == 0


def _list_settings(name: str, settings: _Settings) -> tuple[KernelConfig, ...]:
    return tuple(KernelConfig(name, (width, NARROW), (tile,)) for width, tile in settings)
