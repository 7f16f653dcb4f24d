"""Launches the kernels of vnm.cu: their settings, their arguments, and their compilation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from ..cuda.nvrtc import Launcher, bind_context, compile_kernel, read_shared_source
from ..custom_op import ACTS

HERE = Path(__file__).parent


# Mirrored by vnm.cu: change them together.
class LaunchArguments(ctypes.Structure):
    """The argument of both kernels."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "packed", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "out_stride", "meta", "columns")),
        *((name, ctypes.c_int32) for name in ("rows", "cols", "tokens", "steps")),
    )


@dataclass(frozen=True, slots=True)
class Tile:
    """The part of the output that one block of threads computes.

    Attributes:
        warp_rows: Rows of a warp.
        warp_tokens: Tokens of a warp.
        down: Warps over rows.
        across: Warps over tokens.
        stages: Steps of the pipeline in shared memory.
    """

    warp_rows: int
    warp_tokens: int
    down: int
    across: int
    stages: int

    @property
    def rows(self) -> int:
        """The rows of the block."""
        return self.warp_rows * self.down

    @property
    def tokens(self) -> int:
        """The tokens of the block."""
        return self.warp_tokens * self.across

    @property
    def threads(self) -> int:
        """The threads of the block."""
        return 32 * self.down * self.across

    def count_shared_bytes(self, group: int) -> int:
        """Returns the bytes of shared memory for groups of ``group`` columns, as in vnm.cu."""
        columns = ceil(self.down * 64 / 128) * 128
        stage = 8 * group * self.tokens * 2 + self.rows // 16 * (512 + 64) + columns
        return max(self.stages * stage, self.rows * self.tokens * 2)


@dataclass(frozen=True, slots=True)
class KernelBuild:
    """One kernel as it is compiled.

    Attributes:
        name: Its name in vnm.cu.
        macros: The macros that fix its sizes, with their values.
        shared: Bytes of shared memory.
        threads: Threads of a block.
    """

    name: str
    macros: tuple[tuple[str, int], ...]
    shared: int
    threads: int


Launch = Callable[[KernelBuild, LaunchArguments, tuple[int, int]], None]


def specify_linear(
    tile: Tile,
    group: int,
    share: int,
    *,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    act: str,
    feature_major: bool,
) -> KernelBuild:
    """Returns vnm_linear for groups of ``group`` columns that ``share`` rows choose from."""
    macros = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "GROUP": group,
        "SHARE": share,
        "WARP_ROWS": tile.warp_rows,
        "WARP_TOKENS": tile.warp_tokens,
        "WARPS_DOWN": tile.down,
        "WARPS_ACROSS": tile.across,
        "STAGES": tile.stages,
        "BIAS": 0 if bias is None else 2 if bias == torch.float32 else 1,
        "ACT": ACTS.index(act),
        "FEATURE_MAJOR": int(feature_major),
    }
    return KernelBuild(
        "vnm_linear", tuple(macros.items()), tile.count_shared_bytes(group), tile.threads
    )


_ANY = Tile(16, 8, 1, 1, 2)


def specify_transpose(dtype: torch.dtype) -> KernelBuild:
    """Returns to_feature_major."""
    build = specify_linear(_ANY, 4, 16, dtype=dtype, bias=None, act="none", feature_major=False)
    return KernelBuild("to_feature_major", build.macros, 64 * 66 * 2, 256)


@cache
def read_sources() -> str:
    """Returns the source that is compiled for a GPU."""
    device, kernels = ((HERE / name).read_text() for name in ("device.cuh", "vnm.cu"))
    return device + read_shared_source() + kernels


def make_launch(device: torch.device) -> Launch:
    """Returns a function that launches on a CUDA device and compiles a kernel on first use."""

    def launch(build: KernelBuild, arguments: LaunchArguments, grid: tuple[int, int]) -> None:
        with torch.cuda.device(device):
            index = torch.cuda.current_device()
            bind_context(index)
            _load(build, index)(arguments, grid, build.threads)

    return launch


@cache
def _load(build: KernelBuild, device: int) -> Launcher:
    code = compile_kernel(read_sources(), torch.cuda.get_device_capability(device), build.macros)
    return Launcher(code, build.name, build.shared, device)


def find_address(tensor: Tensor | None) -> int | None:
    """Returns where a tensor's values begin."""
    return None if tensor is None else tensor.data_ptr()
