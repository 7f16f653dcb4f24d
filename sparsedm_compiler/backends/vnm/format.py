"""The packed V:n:m weight: 2:4 fragments of gathered columns, in the order of vnm.cu's lanes.

A step is 32 kept columns: 8 groups of m columns, of which V rows share 4 each. One block of bytes:

    values   [rows / 16, steps, 32 lanes, 4 registers, 2]  the weight's dtype
    meta     [rows / 16, steps, 8, 2, 2] int16: indices into the 4, 2 bits each; rows q and q + 8
    columns  [rows / V, steps, 32] int16: indices into the 8 m columns of the step

Where a row keeps fewer than 2 of its 4 columns, zeros fill the rest; steps beyond the last group
are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PackError
from ...patterns import VNM, Pattern
from ...patterns.vnm import SHARED_COLUMNS

GROUPS = 8
"""Groups of m columns in a step."""

TYPES = (torch.float16, torch.bfloat16)

_TILE = 16  # rows that one instruction multiplies
_WIDEST = 32


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes of a packed weight.

    Attributes:
        rows: Output channels.
        cols: Input channels, times the taps of a kernel.
        pattern: A V:n:m pattern.
    """

    rows: int
    cols: int
    pattern: Pattern

    @property
    def steps(self) -> int:
        """The steps of a row, of 8 groups each."""
        return ceil(self.cols / (GROUPS * self.pattern.m))

    @property
    def meta(self) -> int:
        """The byte where the section ``meta`` begins."""
        return self.rows * self.steps * 32

    @property
    def columns(self) -> int:
        """The byte where the section ``columns`` begins."""
        return self.meta + self.rows * self.steps * 4

    @property
    def size(self) -> int:
        """The bytes of all sections."""
        return self.columns + self.rows // self.pattern.height * self.steps * 64


def why_refused(pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
    """Returns why a weight cannot be packed, as a sentence; None if it can."""
    if not isinstance(pattern, VNM):
        return f"{pattern} is not V:n:m, which needs 4 shared columns of every m, e.g. '64:2:8'"
    if pattern.n > 2:
        return f"{pattern} keeps {pattern.n} of 4 columns, sparse tensor cores multiply 2"
    if dtype not in TYPES:
        return f"no V:n:m kernel for {str(dtype).removeprefix('torch.')}, only for half precision"
    if pattern.height % _TILE:
        return f"{pattern.height} rows that share columns are not a multiple of {_TILE}"
    if pattern.m > _WIDEST:
        return f"groups of {pattern.m} are wider than the {_WIDEST} columns a kernel gathers from"
    reason = pattern.misfit(rows, cols)
    if reason is not None:
        return reason
    return f"{cols} columns are not a multiple of 8" if cols % 8 else None


def pack(weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Returns the packed form (uint8, 1-D) of ``weight * mask``, both [rows, cols].

    Raises PackError for a weight that cannot be packed, or a mask that is not of ``pattern``.
    """
    rows, cols = weight.shape
    reason = why_refused(pattern, rows, cols, weight.dtype)
    if reason is not None:
        raise PackError(f"a weight of {list(weight.shape)} cannot be packed to {pattern}: {reason}")
    blocks = mask.view(rows // pattern.height, pattern.height, -1, pattern.m)
    columns = _select_first(blocks.any(1), SHARED_COLUMNS, pattern)
    chosen = columns.repeat_interleave(pattern.height, 0)
    held = mask.view(rows, -1, pattern.m).gather(2, chosen)
    four = torch.where(held, weight.view(rows, -1, pattern.m).gather(2, chosen), 0)
    indices = _select_first(held, 2, pattern)
    steps = Layout(rows, cols, pattern).steps
    pad = (0, 0, 0, steps * GROUPS - cols // pattern.m)
    values = F.pad(four.gather(2, indices), pad)
    empty = indices.new_tensor([0, 1]).expand(rows, pad[3], 2)
    sections = (
        _arrange_values(values, steps),
        _arrange_indices(torch.cat([indices, empty], 1), steps),
        _arrange_columns(columns, pattern, steps),
    )
    return torch.cat([section.contiguous().view(-1).view(torch.uint8) for section in sections])


def unpack(packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """Returns the masked dense weight [rows, cols], to the bit. Raises PackError for a bad size."""
    layout = _check_size(packed, rows, cols, pattern)
    steps, groups = layout.steps, cols // pattern.m
    values = packed[: layout.meta].view(dtype).view(-1, steps, 8, 4, 2, 2, 2)
    values = values.permute(0, 5, 2, 1, 4, 3, 6).reshape(rows, steps * GROUPS, 2)[:, :groups]
    indices = _read_indices(packed, layout)[:, :groups]
    columns = _read_columns(packed, layout).view(-1, steps * GROUPS, SHARED_COLUMNS)[:, :groups]
    columns = columns % pattern.m
    where = columns.repeat_interleave(pattern.height, 0).gather(2, indices)
    dense = torch.zeros(rows, groups, pattern.m, dtype=dtype, device=packed.device)
    return dense.scatter_(2, where, values).view(rows, cols)


def check(packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype) -> None:
    """Raises PackError unless the kernel can run these bytes within their bounds."""
    layout = _check_size(packed, rows, cols, pattern)
    columns, indices = _read_columns(packed, layout), _read_indices(packed, layout)
    begin = pattern.m * torch.arange(GROUPS, device="cpu").repeat_interleave(SHARED_COLUMNS)
    inside = (columns >= begin) & (columns < begin + pattern.m)
    if not bool(inside.all()) or not bool((indices[..., 0] < indices[..., 1]).all()):
        raise PackError("the packed weight points outside of its columns")


def _check_size(packed: Tensor, rows: int, cols: int, pattern: Pattern) -> Layout:
    layout = Layout(rows, cols, pattern)
    if packed.dtype is not torch.uint8 or packed.shape != (layout.size,):
        raise PackError(
            f"{tuple(packed.shape)} of {packed.dtype} is no weight of {rows} x {cols} packed to "
            f"{pattern}, which takes {layout.size} bytes"
        )
    return layout


def _read_indices(packed: Tensor, layout: Layout) -> Tensor:
    """Returns the indices of the kept ones of a group's 4 columns: [rows, steps * 8, 2]."""
    meta = packed[layout.meta : layout.columns].view(torch.int16).view(-1, layout.steps, 8, 2, 2)
    halves = meta.permute(0, 4, 2, 1, 3).reshape(layout.rows, layout.steps * 2, 1, 1).int()
    shifts = torch.arange(0, 16, 2, device=packed.device, dtype=torch.int32).view(4, 2)
    return ((halves >> shifts) & 3).view(layout.rows, -1, 2).long()


def _read_columns(packed: Tensor, layout: Layout) -> Tensor:
    """Returns the columns of a step that a block gathers: [rows / V, steps, 32]."""
    columns = packed[layout.columns :].view(torch.int16)
    return columns.view(-1, layout.steps, GROUPS * SHARED_COLUMNS).long()


def _select_first(marks: Tensor, count: int, pattern: Pattern) -> Tensor:
    """Returns the indices of the marks along the last dimension, ascending, ``count`` of them."""
    if bool((marks.sum(-1) > count).any()):
        raise PackError(f"the mask is not one of {pattern}: it keeps more than {count} columns")
    order = marks.logical_not().byte().sort(dim=-1, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def _arrange_values(values: Tensor, steps: int) -> Tensor:
    """Returns values as lanes hold them.

    [rows, groups, 2] -> [tiles, steps, 8, 4, 2 halves of the step, 2 halves of the tile, 2].
    """
    tiles = values.view(-1, 2, 8, steps, 2, 4, 2)  # tile half, row, step, step half, group, pair
    return tiles.permute(0, 3, 2, 5, 4, 1, 6)


def _arrange_indices(indices: Tensor, steps: int) -> Tensor:
    """Returns indices as lanes hold them, int16.

    [rows, groups, 2] in 0 .. 3 -> [tiles, steps, 8, 2 halves of the step, 2].
    """
    shifts = torch.arange(0, 16, 2, device=indices.device).view(4, 2)
    halves = (indices.view(len(indices), steps * 2, 4, 2) << shifts).sum((2, 3))
    tiles = halves.view(-1, 2, 8, steps, 2).permute(0, 3, 2, 4, 1)
    return torch.where(tiles > 0x7FFF, tiles - 0x10000, tiles).to(torch.int16)


def _arrange_columns(columns: Tensor, pattern: Pattern, steps: int) -> Tensor:
    """Returns columns of steps: [blocks, groups, 4] of a group -> [blocks, steps, 32] int16."""
    missing = steps * GROUPS - columns.shape[1]
    spare = torch.arange(SHARED_COLUMNS, device=columns.device)
    columns = torch.cat([columns, spare.expand(len(columns), missing, SHARED_COLUMNS)], 1)
    begin = pattern.m * (torch.arange(steps * GROUPS, device=columns.device) % GROUPS)
    return (columns + begin.view(-1, 1)).view(len(columns), steps, -1).to(torch.int16)
