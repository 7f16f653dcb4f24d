"""The CPU kernels as a family."""

from __future__ import annotations

import math
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import PackError
from ...patterns import Pattern, SharedNM
from ..kernel_family import KernelConfig, KernelFamily, MatmulProblem, OpCall, WeightFormat
from .build import unavailable, version
from .format import check, layout_of, refusal
from .isa import engine
from .ops import dense_weight, nm_conv2d_op, nm_linear_op
from .pack import pack


class CpuFamily(KernelFamily):
    """Kernels for free masks, shared masks, and widely shared masks in bfloat16.

    Layout of a Kernel: (columns of a block, whether it is the layout of wide.h). Tile: (vectors of
    tokens).
    """

    device = "cpu"
    names = ("cpu_free", "cpu_shared", "cpu_wide")

    def unavailable(self) -> str | None:
        return unavailable()

    def refusal(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        return refusal(pattern, rows, cols, dtype)

    def candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        """In the settings that won somewhere (benchmarks/sparse.py)."""
        if isinstance(pattern, SharedNM):
            wide = dtype == torch.bfloat16 and pattern.rows % 16 == 0 and engine() != "plain"
            return (
                *(KernelConfig("cpu_wide", (2048, 1), (tile,)) for tile in (3, 6) if wide),
                *_settings("cpu_shared", (512, 4), (512, 5), (2048, 2)),
            )
        settings = (((64, 6), (96, 5)), ((96, 5), (128, 5)), ((128, 5), (192, 4)))
        place = sum(pattern.density < bound for bound in (0.4, 0.2, 0.1))
        return _settings("cpu_free", *(*settings, ((192, 5), (256, 4)))[place])

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        width, wide = kernel.layout
        return pack(weight, mask, pattern, width=width, wide=bool(wide))

    def unpack(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> Tensor:
        return dense_weight(packed, shape[2:])

    def check(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> torch.dtype:
        check(packed)
        layout = layout_of(packed)
        if (layout.rows, layout.rows * layout.cols) != (shape[0], math.prod(shape)):
            raise PackError(f"it is packed as {layout.rows} x {layout.cols}, not {shape}")
        return layout.dtype

    def call(self, work: MatmulProblem, form: WeightFormat, tile: tuple[int, ...]) -> OpCall:
        if not work.kernel:
            return nm_linear_op, (work.act, *tile)
        geometry = (work.kernel, work.stride, work.padding, work.dilation)
        return nm_conv2d_op, (*map(list, geometry), work.act, *tile)

    def machine(self) -> tuple[Any, ...]:
        capability = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
        return cpu_name(), torch.__version__, version(), engine(), threads, capability


def _settings(name: str, *settings: tuple[int, int]) -> tuple[KernelConfig, ...]:
    return tuple(KernelConfig(name, (width, 0), (tile,)) for width, tile in settings)


@cache
def cpu_name() -> str:
    """The model of this CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
