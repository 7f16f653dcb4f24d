"""The packed weight of wgmma.cu: chunks of columns that 64 rows or 128 keep, 2:4 within or dense.

One unit of bytes for 128 rows (padded with zeros) and a stage of columns:

    values   [2 blocks of 64 rows][kept][2 halves of 8 columns][64 rows][8]  the weight's dtype
    meta     2:4 only: indices of the kept columns of every 4, as quads of threads hold them
    chunks   [kept][2 blocks] int32, the number of the chunk in its stage; padded to 128 bytes

A chunk is 16 columns, or 32 with 2:4 within, of which 16 are kept. Rows of a unit are permuted
(``order_rows``). Columns beyond the last are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PackError
from ...patterns import BlockNM, NestedNM, Pattern

TYPES = (torch.float16, torch.bfloat16)
ROWS = 128
"""Rows of a unit."""
HALF = 64
"""Rows that one instruction multiplies."""
CHUNK = 16
"""Kept columns of a chunk."""
_WIDTHS = (64, 128)  # columns of a stage
_MOST_KEPT = 4  # chunks of a stage
_ALIGN = 8  # rows and columns: 16 bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes of a packed weight.

    Attributes:
        rows: Output channels.
        cols: Input channels, times the taps of a kernel.
        stage_cols: Columns of a stage.
        kept: Chunks that a stage keeps.
        sparse: Whether a chunk is 32 columns with 2:4 within; else 16, dense.
        mixed: Whether the rows of both instructions of a unit take turns; else each has 64 of them.
        picked: Whether a stage of a unit holds one block of 64 rows, whole, or none.
    """

    rows: int
    cols: int
    stage_cols: int
    kept: int
    sparse: bool
    mixed: bool
    picked: bool = False

    @property
    def chunk(self) -> int:
        """The columns of a chunk."""
        return 2 * CHUNK if self.sparse else CHUNK

    @property
    def stages(self) -> int:
        """The stages of a row."""
        return ceil(self.cols / self.stage_cols)

    @property
    def units(self) -> int:
        """The units of 128 rows."""
        return ceil(self.rows / ROWS)

    @property
    def value_bytes(self) -> int:
        """The bytes of a unit's values."""
        return (1 if self.picked else 2) * self.kept * HALF * CHUNK * 2

    @property
    def meta_bytes(self) -> int:
        """The bytes of a unit's indices."""
        return self.kept * 512 if self.sparse else 0

    @property
    def unit_bytes(self) -> int:
        """The bytes of a unit."""
        return self.value_bytes + self.meta_bytes + 128


def why_refused(pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
    """Returns why a weight cannot be packed, as a sentence; None if it can."""
    if dtype not in TYPES:
        return f"no wgmma kernel for {str(dtype).removeprefix('torch.')}, only for half precision"
    if cols % _ALIGN or rows % _ALIGN:
        return f"{rows} rows by {cols} columns are not multiples of {_ALIGN}"
    return why_misfit(pattern) or pattern.misfit(rows, cols)


def why_misfit(pattern: Pattern) -> str | None:
    """Returns why no weight of the pattern can be packed, as a sentence; None if one can."""
    if not isinstance(pattern, (BlockNM, NestedNM)):
        most = pattern.most_kept(4)
        return None if most <= 2 else f"{pattern} keeps up to {most} of 4 columns, not 2"
    if isinstance(pattern, NestedNM) and pattern.inner.most_kept(4) > 2:
        return f"{pattern} keeps more than 2 of 4 columns within its blocks"
    chunk = 2 * CHUNK if isinstance(pattern, NestedNM) else CHUNK
    if pattern.rows % HALF or pattern.columns % chunk:
        return f"{pattern} has blocks that are not multiples of {HALF} rows and {chunk} columns"
    fitting = [stage for stage in _WIDTHS if stage % pattern.width == 0]
    if not fitting:
        return f"{pattern} has groups of {pattern.width} columns, which {_WIDTHS} do not hold whole"
    kept = _count_kept(pattern, fitting[0], chunk)
    if kept > _MOST_KEPT or (chunk > CHUNK and kept == 3):
        return (
            f"{pattern} keeps {kept} chunks of {fitting[0]} columns, which no kernel is built for"
        )
    return None


@lru_cache(maxsize=1024)
def choose_layout(pattern: Pattern, rows: int, cols: int) -> Layout:
    """Returns the layout of a weight that is not refused."""
    if not isinstance(pattern, (BlockNM, NestedNM)):
        return Layout(rows, cols, _WIDTHS[0], _WIDTHS[0] // (2 * CHUNK), sparse=True, mixed=True)
    sparse = isinstance(pattern, NestedNM)
    stage = next(stage for stage in _WIDTHS if stage % pattern.width == 0)
    kept = _count_kept(pattern, stage, 2 * CHUNK if sparse else CHUNK)
    return Layout(rows, cols, stage, kept, sparse, mixed=pattern.rows % ROWS == 0)


def _count_kept(pattern: BlockNM | NestedNM, stage: int, chunk: int) -> int:
    return stage // pattern.width * pattern.n * pattern.columns // chunk


def pack(weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Returns the packed form (uint8, 1-D) of ``weight * mask``, both [rows, cols].

    Raises PackError for a weight that cannot be packed, or a mask that is not of ``pattern``.
    """
    rows, cols = weight.shape
    reason = why_refused(pattern, rows, cols, weight.dtype)
    if reason is not None:
        raise PackError(f"a weight of {list(weight.shape)} cannot be packed to {pattern}: {reason}")
    layout = choose_layout(pattern, rows, cols)
    pad = (0, layout.stages * layout.stage_cols - cols, 0, layout.units * ROWS - rows)
    values = _split(F.pad(torch.where(mask, weight, 0), pad), layout)
    held = _split(F.pad(mask, pad), layout)  # [units, stages, 2, 64, chunks, columns]
    chunks = _select_chunks(held.any(5).any(3), layout, pattern)  # [units, stages, 2, kept]
    index = chunks[:, :, :, None, :, None].expand(-1, -1, -1, HALF, -1, layout.chunk)
    values, held = values.gather(4, index), held.gather(4, index)
    sections = [_arrange_chunks(chunks)]
    if layout.sparse:
        values, columns = _compress(values, held, pattern)
        sections.insert(0, _arrange_meta(columns, layout))
    return torch.cat([_arrange_values(values), *sections], 2).view(-1)


def unpack(packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """Returns the masked dense weight [rows, cols], to the bit. Raises PackError for a bad size."""
    layout = choose_layout(pattern, rows, cols)
    units = _check_size(packed, layout, pattern)
    shape = layout.units, layout.stages, 2, layout.kept
    values = units[..., : layout.value_bytes].contiguous().view(dtype).view(*shape, 2, HALF, 8)
    values = values.permute(0, 1, 2, 5, 3, 4, 6).flatten(5)  # [units, stages, 2, 64, kept, 16]
    if layout.sparse:
        values = _expand(values, _read_meta(units, layout))
    chunks = _read_chunks(units, layout)
    index = chunks[:, :, :, None, :, None].expand_as(values)
    per_stage = layout.stage_cols // layout.chunk
    dense = values.new_zeros(*shape[:3], HALF, per_stage, layout.chunk)
    return _join(dense.scatter_(4, index, values), layout)[:rows, :cols].contiguous()


def check(packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype) -> None:
    """Raises PackError unless the kernel can run these bytes within their bounds."""
    layout = choose_layout(pattern, rows, cols)
    units = _check_size(packed, layout, pattern)
    chunks = _read_chunks(units, layout)
    inside = (chunks >= 0) & (chunks < layout.stage_cols // layout.chunk)
    ascending = bool((chunks[..., 1:] > chunks[..., :-1]).all())
    columns = _read_meta(units, layout) if layout.sparse else None
    ordered = columns is None or bool((columns[..., 0] < columns[..., 1]).all())
    if not bool(inside.all()) or not ascending or not ordered:
        raise PackError("the packed weight points outside of its columns")


def order_rows(*, mixed: bool, device: torch.device | None = None) -> Tensor:
    """Returns the row of a unit that each of its 2 x 64 rows of values holds: [128]."""
    block, warp, half, quad = torch.meshgrid(
        *(torch.arange(size, device=device) for size in (2, 4, 2, 8)), indexing="ij"
    )
    if mixed:
        return (32 * warp + 4 * quad + 2 * block + half).flatten()
    return (64 * block + 16 * warp + 2 * quad + half).flatten()


def _check_size(packed: Tensor, layout: Layout, pattern: Pattern) -> Tensor:
    """Returns the units: [units, stages, bytes]."""
    size = layout.units * layout.stages * layout.unit_bytes
    if packed.dtype is not torch.uint8 or packed.shape != (size,):
        raise PackError(
            f"{tuple(packed.shape)} of {packed.dtype} is no weight of {layout.rows} x "
            f"{layout.cols} packed to {pattern}, which takes {size} bytes"
        )
    return packed.view(layout.units, layout.stages, layout.unit_bytes)


def _split(matrix: Tensor, layout: Layout) -> Tensor:
    """Returns a padded matrix as [units, stages, 2, 64, chunks of a stage, columns of a chunk]."""
    order = order_rows(mixed=layout.mixed, device=matrix.device)
    units = matrix.view(layout.units, ROWS, -1)[:, order]
    shape = layout.units, 2, HALF, layout.stages, -1, layout.chunk
    return units.view(shape).permute(0, 3, 1, 2, 4, 5)


def _join(split: Tensor, layout: Layout) -> Tensor:
    """Returns the padded matrix of what ``_split`` gives."""
    order = order_rows(mixed=layout.mixed, device=split.device)
    units = split.permute(0, 2, 3, 1, 4, 5).reshape(layout.units, ROWS, -1)
    matrix = torch.empty_like(units)
    matrix[:, order] = units
    return matrix.flatten(0, 1)


def _select_chunks(marks: Tensor, layout: Layout, pattern: Pattern) -> Tensor:
    """Returns the numbers of the marked chunks, ascending, ``kept`` of them; others fill up."""
    if bool((marks.sum(-1) > layout.kept).any()):
        raise PackError(f"the mask is not one of {pattern}: too many chunks of columns are kept")
    order = marks.logical_not().byte().sort(dim=-1, stable=True).indices
    return order[..., : layout.kept].sort(dim=-1).values


def _compress(values: Tensor, held: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Returns the 2 kept values of every 4, and their columns: [..., 32] -> [..., 16], [..., 8, 2].

    Where a row keeps fewer than 2, columns it does not keep fill up, whose values are zeros.
    """
    fours, kept = torch.unflatten(values, -1, (8, 4)), torch.unflatten(held, -1, (8, 4))
    if bool((kept.sum(-1) > 2).any()):
        raise PackError(f"the mask is not one of {pattern}: it keeps more than 2 of 4 columns")
    order = kept.logical_not().byte().sort(dim=-1, stable=True).indices[..., :2]
    columns = order.sort(dim=-1).values
    return fours.gather(-1, columns).flatten(-2), columns


def _expand(values: Tensor, columns: Tensor) -> Tensor:
    """Returns what ``_compress`` was given, zeros where nothing is kept."""
    fours = values.new_zeros(*values.shape[:-1], 8, 4)
    return fours.scatter_(-1, columns, torch.unflatten(values, -1, (8, 2))).flatten(-2)


def _arrange_values(values: Tensor) -> Tensor:
    """Returns [units, stages, 2, 64, kept, 16] as bytes of units."""
    halves = torch.unflatten(values, -1, (2, 8)).permute(0, 1, 2, 4, 5, 3, 6)
    return halves.contiguous().view(torch.uint8).flatten(2)


def _arrange_meta(columns: Tensor, layout: Layout) -> Tensor:
    """Returns indices [units, stages, 2, 64, kept, 8, 2] as bytes of units.

    The register of thread c of a quad (rows g and g + 8 of a warp's 16) holds columns 16 c on: its
    low half row g, its high half row g + 8, 4 bits for every 4 columns. Selector 0 reads threads 0
    and 1, selector 1 threads 2 and 3: so two chunks share a register where there are two.
    """
    nibbles = (columns[..., 0] | columns[..., 1] << 2).int()  # [units, stages, 2, 64, kept, 8]
    shape = (*nibbles.shape[:3], 4, 2, 8, layout.kept, 2, 4)  # warp, half, g, chunk, thread, fours
    shifts = torch.arange(4, device=columns.device, dtype=torch.int32) * 4
    words = (nibbles.view(shape) << shifts).sum(-1, dtype=torch.int32)
    words = words[:, :, :, :, 0] | words[:, :, :, :, 1] << 16  # [units, stages, 2, 4, 8, kept, 2]
    pairs = torch.unflatten(words, 5, (-1, min(2, layout.kept)))  # pair, selector, thread
    ordered = pairs.permute(0, 1, 5, 3, 4, 6, 7, 2)  # [.., pair, warp, g, selector, thread, block]
    return ordered.contiguous().view(torch.uint8).flatten(2)


def _read_meta(units: Tensor, layout: Layout) -> Tensor:
    """Returns what ``_arrange_meta`` was given."""
    section = units[..., layout.value_bytes : layout.value_bytes + layout.meta_bytes]
    shared = min(2, layout.kept)
    shape = layout.units, layout.stages, layout.kept // shared, 4, 8, shared, 2, 2
    words = section.contiguous().view(torch.int32).view(shape).permute(0, 1, 7, 3, 4, 2, 5, 6)
    words = words.flatten(5, 6)  # [units, stages, block, warp, g, kept, thread]
    halves = torch.stack((words, words >> 16), 4)  # [..., warp, half, g, kept, thread]
    shifts = torch.arange(4, device=units.device, dtype=torch.int32) * 4
    nibbles = (halves[..., None] >> shifts).reshape(*words.shape[:3], HALF, layout.kept, 8)
    return torch.stack((nibbles & 3, nibbles >> 2 & 3), -1).long()


def _arrange_chunks(chunks: Tensor) -> Tensor:
    """Returns [units, stages, 2, kept] as bytes of units."""
    ordered = chunks.transpose(2, 3).flatten(2).int()
    return F.pad(ordered, (0, 32 - ordered.shape[2])).contiguous().view(torch.uint8).flatten(2)


def _read_chunks(units: Tensor, layout: Layout) -> Tensor:
    """Returns the chunks that are kept: [units, stages, 2, kept]."""
    section = units[..., layout.value_bytes + layout.meta_bytes :].contiguous().view(torch.int32)
    pairs = torch.unflatten(section[..., : 2 * layout.kept], -1, (layout.kept, 2))
    return pairs.transpose(2, 3).long()
