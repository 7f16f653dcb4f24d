"""Launches the kernels of wgmma.cu: their arguments, tensor maps, and the split of columns."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil

import torch
from torch import Tensor

from ...errors import KernelError
from ..cuda.device import find_device
from ..cuda.nvrtc import Launcher, bind_context, call_driver, compile_kernel
from .build import KernelBuild, Tile, read_sources, specify_linear
from .format import Layout

_MAP_BYTES = 128
_MOST_SPLITS = 8
_STAGES_PER_SPLIT = 4
OVERLAPS = False
"""Whether a kernel may begin while the one before it still runs. Off until a card has shown it
right (a test does) and faster in whole models."""


# Mirrored by wgmma.cu: change them together.
class LaunchArguments(ctypes.Structure):
    """The argument of both kernels."""

    _fields_ = (
        *((name, ctypes.c_byte * _MAP_BYTES) for name in ("x", "out_map")),
        *((name, ctypes.c_void_p) for name in ("packed", "out", "bias", "parts")),
        *((name, ctypes.c_int32) for name in ("tokens", "rows", "stages", "units")),
        *((name, ctypes.c_int32) for name in ("row_tiles", "token_tiles", "group", "splits")),
        *((name, ctypes.c_int32) for name in ("bias_is_float", "sums")),
        ("padding", ctypes.c_byte * 56),  # to a multiple of 64, as maps are aligned: all is copied
    )

    def set_map(self, name: str, encoded: bytes) -> None:
        """Copies a tensor map."""
        begin = ctypes.addressof(self) + getattr(LaunchArguments, name).offset
        ctypes.memmove(begin, encoded, _MAP_BYTES)


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
        bind_context(torch.cuda.current_device())
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
        arguments.set_map(
            "x", encode_map(flat.data_ptr(), sizes, flat.stride(0), tile.tokens, flat.dtype)
        )
        if tile.slices:
            box = tile.tokens // tile.slices
            arguments.set_map(
                "out_map", encode_map(out.data_ptr(), (rows, tokens), rows, box, out.dtype)
            )
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
        Launcher(code, "wgmma_linear", build.shared, device, overlaps=OVERLAPS),
        Launcher(code, "reduce_parts", 0, device, overlaps=OVERLAPS),
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
