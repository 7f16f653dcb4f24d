"""The kernels of vnm.cu: their settings, their arguments, and how they are launched."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from ..cuda.nvrtc import Launcher, compiled
from ..custom_op import ACTS

HERE = Path(__file__).parent


# Mirrored by vnm.cu: change them together.
class Problem(ctypes.Structure):
    """The argument of both kernels."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "packed", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "out_stride", "meta", "columns")),
        *((name, ctypes.c_int32) for name in ("rows", "cols", "tokens", "steps")),
    )


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block of threads computes: warps over rows and over tokens, each a part of both."""

    warp_rows: int
    warp_tokens: int
    down: int
    across: int
    stages: int

    @property
    def rows(self) -> int:
        return self.warp_rows * self.down

    @property
    def tokens(self) -> int:
        return self.warp_tokens * self.across

    @property
    def threads(self) -> int:
        return 32 * self.down * self.across

    def shared(self, group: int) -> int:
        """Bytes of shared memory; as in vnm.cu."""
        columns = ceil(self.down * 64 / 128) * 128
        stage = 8 * group * self.tokens * 2 + self.rows // 16 * (512 + 64) + columns
        return max(self.stages * stage, self.rows * self.tokens * 2)


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel as it is compiled."""

    name: str
    macros: tuple[tuple[str, int], ...]
    shared: int
    threads: int


Launch = Callable[[Build, Problem, tuple[int, int]], None]


def linear_build(
    tile: Tile,
    group: int,
    share: int,
    *,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    act: str,
    feature_major: bool,
) -> Build:
    """vnm_linear for groups of ``group`` columns that ``share`` rows choose from."""
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
    return Build("vnm_linear", tuple(macros.items()), tile.shared(group), tile.threads)


_ANY = Tile(16, 8, 1, 1, 2)


def turn_build(dtype: torch.dtype) -> Build:
    """to_feature_major."""
    build = linear_build(_ANY, 4, 16, dtype=dtype, bias=None, act="none", feature_major=False)
    return Build("to_feature_major", build.macros, 64 * 66 * 2, 256)


@cache
def source() -> str:
    """What is compiled for a GPU."""
    return (HERE / "device.cuh").read_text() + (HERE / "vnm.cu").read_text()


@cache
def version() -> str:
    """A hash of the source: measurements of another one do not count."""
    return hashlib.sha256(source().encode()).hexdigest()[:16]


def on_device(device: torch.device) -> Launch:
    """Launches on a CUDA device, compiling what is not compiled yet."""

    def launch(build: Build, problem: Problem, grid: tuple[int, int]) -> None:
        with torch.cuda.device(device):
            _launcher(build, torch.cuda.current_device())(problem, grid, build.threads)

    return launch


@cache
def _launcher(build: Build, device: int) -> Launcher:
    code = compiled(source(), torch.cuda.get_device_capability(device), build.macros)
    return Launcher(code, build.name, build.shared, device)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's values begin."""
    return None if tensor is None else tensor.data_ptr()
