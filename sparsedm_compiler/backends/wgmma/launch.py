"""Launches the kernels of wgmma.cu: their settings, tensor maps and compilation."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from ...errors import KernelError
from ..cuda.device import find_device
from ..cuda.nvrtc import Launcher, call_driver, compile_kernel
from ..custom_op import ACTS
from .format import ROWS, Layout

HERE = Path(__file__).parent
_SPARE = 1024 + 128  # bytes: the alignment of shared memory, barriers
_MAP_BYTES = 128
_MOST_STAGES = 8
_FEWEST_STAGES = 3
_MOST_SPLITS = 8
_STAGES_PER_SPLIT = 4


# Mirrored by wgmma.cu: change them together.
class LaunchArguments(ctypes.Structure):
    """The argument of both kernels."""

    _fields_ = (
        *((name, ctypes.c_byte * _MAP_BYTES) for name in ("x", "out_map")),
        *((name, ctypes.c_void_p) for name in ("packed", "out", "bias", "parts")),
        *((name, ctypes.c_int32) for name in ("tokens", "rows", "stages", "units")),
        *((name, ctypes.c_int32) for name in ("row_tiles", "token_tiles", "group", "splits")),
        *((name, ctypes.c_int32) for name in ("bias_is_float", "sums")),
    )


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
    product = write_product(tokens, sparse=sparse, dtype=dtype)
    return (HERE / "device.cuh").read_text() + product + (HERE / "wgmma.cu").read_text()


@cache
def hash_sources() -> str:
    """Returns a hash of the source: measurements of other sources do not count."""
    return hashlib.sha256(read_sources(64, True, torch.bfloat16).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A build loaded on a device."""

    linear: Launcher
    reduce: Launcher
    threads: int
    multiprocessors: int


def launch_linear(
    flat: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out: Tensor,
    layout: Layout,
    tile: Tile,
    act: str,
) -> None:
    """Writes act(x W^T + b) to ``out`` [tokens, rows].

    flat: x [tokens, cols], each row at a multiple of 16 bytes. bias: [rows], contiguous.
    """
    with torch.cuda.device(flat.device):
        prepared = _prepare(layout, tile, flat.dtype, act, torch.cuda.current_device())
        tokens, rows = out.shape
        row_tiles, token_tiles = ceil(rows / tile.rows), ceil(tokens / tile.tokens)
        tiles = row_tiles * token_tiles
        splits = choose_splits(tiles, layout.stages, prepared.multiprocessors)
        arguments = LaunchArguments(
            packed=packed.data_ptr(), out=out.data_ptr(), tokens=tokens, rows=rows,
            bias=None if bias is None else bias.data_ptr(),
            bias_is_float=int(bias is not None and bias.dtype == torch.float32),
            stages=layout.stages, units=layout.units, row_tiles=row_tiles, token_tiles=token_tiles,
            group=tile.raster or row_tiles, splits=splits, sums=int(splits > 1),
        )  # fmt: skip
        sizes = flat.shape[1], tokens
        arguments.x[:] = encode_map(flat.data_ptr(), sizes, flat.stride(0), tile.tokens, flat.dtype)
        if tile.slices:
            box = tile.tokens // tile.slices
            arguments.out_map[:] = encode_map(out.data_ptr(), (rows, tokens), rows, box, out.dtype)
        if splits > 1:
            parts = torch.empty(splits, tokens, rows, dtype=torch.float32, device=flat.device)
            arguments.parts = parts.data_ptr()
        blocks = min(tiles * splits, prepared.multiprocessors)
        prepared.linear(arguments, (blocks, 1), prepared.threads)
        if splits > 1:
            prepared.reduce(arguments, (ceil(tokens * rows / 1024), 1), 256)


def choose_splits(tiles: int, stages: int, multiprocessors: int) -> int:
    """Returns into how many parts the columns are cut, so that few tiles keep a device busy."""
    most = min(_MOST_SPLITS, stages // _STAGES_PER_SPLIT)
    return max(1, min(most, multiprocessors // tiles))


@cache
def _prepare(layout: Layout, tile: Tile, dtype: torch.dtype, act: str, device: int) -> _Prepared:
    facts = find_device(device)
    if facts is None:
        raise KernelError("no CUDA device can be used")
    build = specify_linear(layout, tile, dtype=dtype, act=act, room=facts.shared_bytes)
    source = read_sources(tile.tokens, layout.sparse, dtype)
    linear, reduce = _load(source, build, facts.capability, device)
    return _Prepared(linear, reduce, build.threads, facts.multiprocessors)


@cache
def _load(
    source: str, build: KernelBuild, capability: tuple[int, int], device: int
) -> tuple[Launcher, Launcher]:
    code = compile_kernel(source, capability, build.macros, feature="a")
    return (
        Launcher(code, "wgmma_linear", build.shared, device),
        Launcher(code, "reduce_parts", 0, device),
    )


# Numbers of cuda.h's enumerations.
_DATA_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _FILL_ZEROS = 0, 3, 3, 0


@lru_cache(maxsize=4096)
def encode_map(
    address: int, sizes: tuple[int, int], stride: int, box: int, dtype: torch.dtype
) -> bytes:
    """Returns the tensor map of a matrix, read or written in boxes of 64 columns.

    Args:
        address: Where it begins, a multiple of 16 bytes.
        sizes: (columns, rows).
        stride: Elements from one row to the next, a multiple of 8.
        box: Rows of a box.
        dtype: Of its elements.
    """
    buffer = ctypes.create_string_buffer(2 * _MAP_BYTES)
    begin = ctypes.addressof(buffer)
    aligned = begin + -begin % 64
    call_driver(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(aligned),
        _DATA_TYPES[dtype],
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(*sizes),
        (ctypes.c_uint64 * 1)(2 * stride),
        (ctypes.c_uint32 * 2)(64, box),
        (ctypes.c_uint32 * 2)(1, 1),
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        _PROMOTE_256B,
        _FILL_ZEROS,
    )
    return ctypes.string_at(aligned, _MAP_BYTES)
