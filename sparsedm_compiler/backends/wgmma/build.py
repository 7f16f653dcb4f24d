"""Compiles wgmma.cu: tiles that fit, macros, the instruction as CUDA C++."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ...errors import KernelError
from ..cuda.device import CudaDevice
from ..cuda.nvrtc import compile_kernel, read_shared_source
from ..custom_op import ACTS
from .format import ROWS, Layout

HERE = Path(__file__).parent
_SPARE = 1024 + 128  # bytes: the alignment of shared memory, barriers
_MOST_STAGES = 8
_FEWEST_STAGES = 3


@dataclass(frozen=True, slots=True)
class Tile:
    """The part of the output that one block of threads computes at a time.

    Attributes:
        tokens: Its tokens.
        groups: Warpgroups that multiply, 128 rows each.
        slices: Slices in which it leaves through shared memory; 0 for straight to the output.
        raster: Tiles over rows that are done before the next tokens; 0 for all.
    """

    tokens: int
    groups: int
    slices: int = 0
    raster: int = 0

    @property
    def rows(self) -> int:
        """The rows of the tile."""
        return ROWS * self.groups

    @property
    def threads(self) -> int:
        """The threads of the block."""
        return 128 * (self.groups + 1)

    def count_stages(self, layout: Layout, room: int) -> int:
        """Returns the stages that fit into ``room`` bytes of shared memory; 0 if too few do."""
        stage = self._stage_bytes(layout)
        stages = min(_MOST_STAGES, (room - _SPARE - self._out_bytes()) // (stage + 16))
        return stages if stages >= _FEWEST_STAGES else 0

    def count_shared_bytes(self, layout: Layout, stages: int) -> int:
        """Returns the bytes of shared memory that a block takes."""
        return stages * (self._stage_bytes(layout) + 16) + self._out_bytes() + 1024

    def _stage_bytes(self, layout: Layout) -> int:
        return self.tokens * layout.stage_cols * 2 + self.groups * layout.unit_bytes

    def _out_bytes(self) -> int:
        return self.groups * ROWS * 2 * (self.tokens // self.slices) if self.slices else 0


@dataclass(frozen=True, slots=True)
class KernelBuild:
    """wgmma.cu as it is compiled.

    Attributes:
        macros: The macros that fix its sizes, with their values.
        shared: Bytes of shared memory of wgmma_linear.
        threads: Threads of a block of it.
    """

    macros: tuple[tuple[str, int], ...]
    shared: int
    threads: int


def specify_linear(
    layout: Layout, tile: Tile, *, dtype: torch.dtype, act: str, room: int
) -> KernelBuild:
    """Returns the build for a packed weight's layout; ``room``: bytes of shared memory there are.

    Raises KernelError where the tile does not fit.
    """
    stages = tile.count_stages(layout, room)
    if not stages:
        raise KernelError(f"a tile of {tile.tokens} tokens by {tile.rows} rows needs more memory")
    macros = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "SPARSE": int(layout.sparse),
        "TOKENS": tile.tokens,
        "WARPGROUPS": tile.groups,
        "STAGE_COLS": layout.stage_cols,
        "KEPT": layout.kept,
        "STAGES": stages,
        "SLICES": tile.slices,
        "MIXED": int(layout.mixed),
        "PICKED": int(layout.picked),
        "ACT": ACTS.index(act),
    }
    shared = tile.count_shared_bytes(layout, stages)
    return KernelBuild(tuple(macros.items()), shared, tile.threads)


def write_product(tokens: int, *, sparse: bool, dtype: torch.dtype) -> str:
    """Returns ``Product<tokens>`` in CUDA C++: sums += values x, one wgmma of 64 rows."""
    count = tokens // 2
    sums = ", ".join(f"%{index}" for index in range(count))
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    values, x, meta, adds, selector = (f"%{count + index}" for index in range(5))
    name = f"m64n{tokens}k{32 if sparse else 16}.f32.{kind}.{kind}"
    chosen = f" {meta}, {selector}," if sparse else ""
    call = f"wgmma.mma_async{'.sp' if sparse else ''}.sync.aligned.{name}"
    outputs = ", ".join(f'"+f"(sums[{index}])' for index in range(count))
    return f"""
template <int tokens>
struct Product;
template <>
struct Product<{tokens}> {{
  template <int selector>
  DEVICE void run(float (&sums)[{count}], u64 values, u64 x, u32 meta, int adds) {{
    asm volatile("{{ .reg .pred p; setp.ne.b32 p, {adds}, 0;\\n"
      "{call} {{{sums}}}, {values}, {x},{chosen} p, 1, 1, 0, 0; }}\\n"
      : {outputs} : "l"(values), "l"(x), "r"(meta), "r"(adds), "n"(selector));
  }}
}};
"""


@cache
def read_sources(tokens: int, sparse: bool, dtype: torch.dtype) -> str:
    """Returns the source that is compiled for one shape of the instruction."""
    instruction = write_product(tokens, sparse=sparse, dtype=dtype)
    device, kernels = ((HERE / name).read_text() for name in ("device.cuh", "wgmma.cu"))
    return device + read_shared_source() + instruction + kernels


Use = tuple[Layout, Tile, torch.dtype, str]
"""What a kernel is compiled for: a layout, a tile, a dtype and an activation."""


def build_ahead(uses: Iterable[Use], device: CudaDevice) -> None:
    """Compiles kernels on all cores. A failure is left to the call, which tells it."""
    jobs = set()  # tiles that differ in their raster alone are one
    for layout, tile, dtype, act in uses:
        with suppress(KernelError):
            wanted = specify_linear(layout, tile, dtype=dtype, act=act, room=device.shared_bytes)
            jobs.add((read_sources(tile.tokens, layout.sparse, dtype), wanted.macros))

    def build(job: tuple[str, tuple[tuple[str, int], ...]]) -> None:
        source, macros = job
        with suppress(KernelError):
            compile_kernel(source, device.capability, macros, feature="a")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, jobs))
