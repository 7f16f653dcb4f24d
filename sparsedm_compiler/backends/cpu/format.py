"""The packed N:M weight: one block of bytes that kernels read and files hold."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import ceil
from typing import Final

import torch
from torch import Tensor

from ...errors import PackError
from ...patterns import Pattern, SharedNM

# Mirrored by format.h: change them together.
HEADER: Final = struct.Struct("<12iq3q")
"""The fields of the header, in its order."""
HEADER_BYTES: Final = HEADER.size
_MAGIC: Final = 0x314D4E53
TYPES: Final = (torch.float32, torch.bfloat16)
"""Dtypes of values and activations; their index is their code in vec.h."""
_ALIGN: Final = 64
UNIT, DEPTH = 16, 32  # rows and kept columns of a block of the layouts WIDE and BLOCKS
NARROW, WIDE, BLOCKS = range(3)
"""Layouts by their codes: that of all dtypes, and those of wide.h and of blocks.h in bfloat16."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a packed weight of ``rows`` x ``cols``, n kept of every m columns.

    Attributes:
        dtype: Dtype of the values, one of TYPES.
        rows: Output channels.
        cols: The taps of a kernel, times its input channels.
        n: Kept columns of a group.
        m: Columns of a group.
        share: Rows that have one mask; 0 where each has its own.
        col_block: Columns of a block.
        row_block: Rows of a block.
        wide: NARROW, WIDE or BLOCKS.
    """

    dtype: torch.dtype
    rows: int
    cols: int
    n: int
    m: int
    share: int
    col_block: int
    row_block: int
    wide: int = NARROW

    @property
    def unit(self) -> int:
        """The rows that a kernel works on at once."""
        if self.wide:
            return UNIT
        if not self.share:
            return 2
        return next((size for size in (4, 3, 2) if self.share % size == 0), 4)

    @property
    def group(self) -> int:
        """The rows that share a mask, padded to whole units."""
        return ceil(self.share / self.unit) * self.unit

    @property
    def kept(self) -> int:
        """The kept columns of a row."""
        return self.cols * self.n // self.m

    def split_rows(self) -> list[tuple[int, int]]:
        """Returns (first row, rows) of every block of rows."""
        return _split(self.rows, self.row_block)

    def split_columns(self) -> list[tuple[int, int]]:
        """Returns (first column, columns) of every block of columns."""
        return _split(self.cols, self.col_block)

    def split_kept(self) -> list[tuple[int, int, int]]:
        """Returns (first column, kept columns, the same as stored) of every block of columns."""
        blocks = []
        for col, cols in self.split_columns():
            kept = cols * self.n // self.m
            blocks.append((col, kept, ceil(kept / DEPTH) * DEPTH if self.wide else kept))
        return blocks

    def locate_sections(self) -> tuple[list[int], int]:
        """Returns where values, index, units and common begin, and the whole size, in bytes."""
        value = self.dtype.itemsize
        if self.share:
            groups = ceil(self.rows / self.share)
            stored = sum(padded for _, _, padded in self.split_kept())
            sizes = [groups * self.group * stored * value, groups * self.kept * 2, 0, 0]
        else:
            pairs = sum(ceil(size / 2) for _, size in self.split_rows())
            units = pairs * len(self.split_columns())
            sizes = [2 * pairs * self.kept * value, 2 * pairs * self.kept, 4 * units, units]
        starts, end = [], _round_up(HEADER.size)
        for size in sizes:
            starts.append(end)
            end += _round_up(size)
        return starts, end

    @classmethod
    def from_fields(cls, fields: tuple[int, ...]) -> Layout:
        """Returns the layout of the fields of a header, which may contradict each other."""
        _, type_, _, rows, cols, n, m, share, _, col_block, row_block, wide = fields[:12]
        return cls(TYPES[type_], rows, cols, n, m, share, col_block, row_block, wide)

    def encode_header(self) -> bytes:
        """Returns the bytes of the header."""
        starts, _ = self.locate_sections()
        type_ = TYPES.index(self.dtype)
        sizes = (self.rows, self.cols, self.n, self.m)
        blocks = (self.share, self.group, self.col_block, self.row_block)
        return HEADER.pack(_MAGIC, type_, self.unit, *sizes, *blocks, self.wide, *starts)


def why_refused(pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
    """Returns why a weight cannot be packed, as a sentence; None if it can."""
    if dtype not in TYPES:
        return f"no CPU kernel for {str(dtype).removeprefix('torch.')}"
    if pattern.is_dense:
        return f"{pattern} keeps everything"
    if pattern.m > (widest := find_widest(pattern)):
        return f"groups of {pattern.m} are wider than the {widest} columns a kernel addresses"
    if cols % pattern.m:
        return f"{cols} columns are not whole groups of {pattern.m}"
    return None


def find_widest(pattern: Pattern) -> int:
    """Returns the most columns of a block: 16 bits address them, or 8 where rows differ."""
    return 65535 if isinstance(pattern, SharedNM) else 256


def plan_layout(
    pattern: Pattern,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    width: int | None = None,
    wide: int = NARROW,
    threads: int = 1,
) -> Layout:
    """Returns the layout for a mask of ``pattern``.

    width: Columns of a block, if not the usual. threads: Those that will run it: where they are
    many for the rows, blocks are of fewer rows, in which a pair shares fewer columns.
    """
    share = pattern.rows if isinstance(pattern, SharedNM) else 0
    height = 64 if rows < 32 * threads else 256  # benchmarks/threads.py
    row_block = height if not share else max(1, height // share) * share
    target = width or (2048 if share else 128)
    groups = cols // pattern.m
    per_block = ceil(groups / max(1, ceil(cols / target)))
    limit = find_widest(pattern) // pattern.m
    col_block = max(1, min(per_block, limit)) * pattern.m
    return Layout(dtype, rows, cols, pattern.n, pattern.m, share, col_block, row_block, wide)


def read_layout(packed: Tensor) -> Layout:
    """Returns the layout that a packed weight states. Raises PackError for other bytes."""
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or packed.numel() < HEADER.size:
        raise PackError(f"a tensor {tuple(packed.shape)} of {packed.dtype} is no packed weight")
    fields = HEADER.unpack(bytes(packed[: HEADER.size].tolist()))
    magic, type_, _, rows, cols, n, m, share, _, col_block, row_block, wide = fields[:12]
    if magic != _MAGIC or type_ not in range(len(TYPES)) or not 0 < n < m or cols % m:
        raise PackError("the bytes do not begin as a packed weight does")
    # At least a byte for every kept value: so sizes are small enough to compute with below.
    if min(rows, cols) < 1 or rows * (cols // m) * n > packed.numel() or not 0 <= share <= rows:
        raise PackError("the packed weight states sizes that cannot be")
    if col_block % m or not m <= col_block <= cols or row_block < 1 or row_block % (share or 2):
        raise PackError("the packed weight states blocks that cannot be")
    if wide not in (NARROW, WIDE, BLOCKS) or (
        wide and (share % UNIT or not share or not type_ or rows % share)
    ):
        raise PackError("the packed weight states a layout that cannot be")
    if wide == BLOCKS and (n % DEPTH or m % DEPTH):
        raise PackError("the packed weight states blocks that are no blocks")
    layout = Layout.from_fields(fields)
    if (
        layout.encode_header() != HEADER.pack(*fields)
        or layout.locate_sections()[1] != packed.numel()
    ):
        raise PackError("the packed weight is cut short or was written by another version")
    return layout


def allocate(layout: Layout) -> Tensor:
    """Returns bytes for a packed weight: the header is written, all else is zero."""
    out = torch.zeros(layout.locate_sections()[1], dtype=torch.uint8, device="cpu")
    header = layout.encode_header()
    out[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    return out


def unpack(packed: Tensor) -> Tensor:
    """Returns the masked dense weight [rows, cols], to the bit. Needs no kernel."""
    layout, packed = read_layout(packed), _align(packed)
    starts, _ = layout.locate_sections()
    values = packed[starts[0] : starts[1]].view(layout.dtype)
    if layout.share:
        return _unpack_shared(layout, values, packed[starts[1] : starts[2]].view(torch.int16))
    index, units = packed[starts[1] : starts[2]], packed[starts[2] : starts[3]].view(torch.int16)
    dense = torch.zeros(layout.rows + 1, layout.cols, dtype=layout.dtype, device="cpu")
    at = unit = 0
    for row, rows in layout.split_rows():
        pairs = ceil(rows / 2)
        for col, cols in layout.split_columns():
            kept = cols * layout.n // layout.m
            size = 2 * pairs * kept
            where = units[2 * unit : 2 * (unit + pairs)].long() & 0xFFFF
            where = torch.where(where < rows, where + row, layout.rows).view(pairs, 1, 2)
            columns = index[at : at + size].long().view(pairs, kept, 2) + col
            dense[where.expand_as(columns), columns] = values[at : at + size].view(pairs, kept, 2)
            at, unit = at + size, unit + pairs
    return dense[: layout.rows]


def check(packed: Tensor) -> None:
    """Raises PackError unless a kernel can run these bytes within their bounds."""
    layout, packed = read_layout(packed), _align(packed)
    starts, _ = layout.locate_sections()
    index, units, common = (
        packed[start:end]
        for start, end in zip(starts[1:], (*starts[2:], packed.numel()), strict=True)
    )
    if layout.share:
        size = ceil(layout.rows / layout.share) * layout.kept
        columns = (index[: 2 * size].view(torch.int16).long() & 0xFFFF).view(-1, layout.kept)
        bounds = [
            cols for _, cols in layout.split_columns() for _ in range(cols * layout.n // layout.m)
        ]
        if bool((columns >= torch.tensor(bounds, device="cpu")).any()):
            raise PackError("the packed weight points outside of its columns")
        if layout.wide == BLOCKS and not lie_side_by_side(columns):
            raise PackError("the columns of a block in the packed weight lie apart")
        return
    rows_of, at, unit = units.view(torch.int16), 0, 0
    for _, rows in layout.split_rows():
        pairs = ceil(rows / 2)
        for _, cols in layout.split_columns():
            kept = cols * layout.n // layout.m
            where = rows_of[2 * unit : 2 * (unit + pairs)].long() & 0xFFFF
            columns = index[at : at + 2 * pairs * kept].int()  # 256 is 0 beside a uint8
            shared = common[unit : unit + pairs].int()
            if bool((where > rows).any() or (columns >= cols).any() or (shared > kept).any()):
                raise PackError("the packed weight points outside of its rows or columns")
            at, unit = at + 2 * pairs * kept, unit + pairs


def lie_side_by_side(columns: Tensor) -> bool:
    """Returns whether every 32 of the kept columns [groups, kept] are neighbours."""
    blocks = columns.view(len(columns), -1, DEPTH)
    return bool((blocks.diff(dim=-1) == 1).all())


def _align(packed: Tensor) -> Tensor:
    """Returns the bytes at an address where their sections can be viewed as numbers."""
    here = packed.is_contiguous() and packed.data_ptr() % 8 == packed.storage_offset() % 8 == 0
    return packed if here else packed.clone(memory_format=torch.contiguous_format)


def _unpack_shared(layout: Layout, values: Tensor, index: Tensor) -> Tensor:
    groups, units = ceil(layout.rows / layout.share), layout.group // layout.unit
    blocks = layout.split_kept()
    stored = sum(padded for _, _, padded in blocks)
    values = values[: groups * layout.group * stored].view(groups, -1)
    index = index[: groups * layout.kept].view(groups, -1).long() & 0xFFFF
    dense = torch.zeros(groups, layout.group, layout.cols, dtype=layout.dtype, device="cpu")
    before = at = 0
    for col, kept, padded in blocks:
        block = values[:, at : at + padded * layout.group]
        if layout.wide:
            shape = (UNIT, DEPTH) if layout.wide == WIDE else (DEPTH // 2, UNIT, 2)
            block = block.reshape(groups, units, -1, *shape)
            if layout.wide == BLOCKS:
                block = block.transpose(3, 4).flatten(4)
            block = block.transpose(2, 3)
            block = block.reshape(groups, layout.group, padded)[:, :, :kept]
        else:
            block = block.reshape(groups, units, kept, layout.unit).transpose(2, 3).flatten(1, 2)
        columns = index[:, before : before + kept, None].transpose(1, 2) + col
        dense.scatter_(2, columns.expand(-1, layout.group, -1), block)
        before, at = before + kept, at + padded * layout.group
    return dense[:, : layout.share].flatten(0, 1)[: layout.rows]


def _split(total: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(size, total - start)) for start in range(0, total, size)]


def _round_up(size: int) -> int:
    return ceil(size / _ALIGN) * _ALIGN
