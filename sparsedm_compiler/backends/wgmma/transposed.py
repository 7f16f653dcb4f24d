"""Blocks in training: which a weight keeps, and the packed transpose for the gradient of x.

``blocks``: int32 [rows / R, groups, n], the numbers of the blocks that a group keeps, ascending.
The transpose of a weight whose groups are 128 columns wide has, of every 128 of its rows and 64 of
its columns, one block of 64 rows at most that is not all zeros: that block is what a unit of the
packed transpose holds for a stage (PICKED in wgmma.cu):

    values   [4 chunks][2 halves of 8 columns][64 rows][8]  the dtype of the product
    picked   int32: 0 or 1, which of the unit's two blocks of 64 rows it is, 2 for none; 128 bytes
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...patterns import BlockNM
from ...patterns.blocks import view_blocks
from .format import CHUNK, HALF, ROWS, Layout, order_rows

_NONE = 2
"""What a stage holds of a unit of which it keeps nothing."""


def find_blocks(weight: Tensor, pattern: BlockNM) -> Tensor:
    """Returns the blocks that a masked weight, or a mask, keeps: int32 [rows / R, groups, n].

    Of a group in which fewer than n are not all zeros, the first others fill up.
    """
    blocks = view_blocks(weight.detach(), pattern.rows, pattern.columns)
    kept = blocks.any(3).any(1) if weight.dtype is torch.bool else _has_values(blocks)
    groups = torch.unflatten(kept, 1, (-1, pattern.m))
    order = groups.logical_not().byte().sort(dim=-1, stable=True).indices
    return order[..., : pattern.n].sort(dim=-1).values.int()


def _has_values(blocks: Tensor) -> Tensor:
    """Returns which blocks are not all zeros, without a tensor of the weight's size."""
    largest: Tensor = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=(1, 3))
    return largest.ne(0)


def expand_blocks(blocks: Tensor, pattern: BlockNM) -> Tensor:
    """Returns the mask [rows, cols] of kept blocks."""
    marks = blocks.new_zeros(*blocks.shape[:2], pattern.m, dtype=torch.bool)
    marks = marks.scatter_(2, blocks.long(), True).flatten(1)
    return marks.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)


@lru_cache(maxsize=1024)
def why_dense_gradient(pattern: BlockNM) -> str | None:
    """Returns why the gradient of x is a dense product, as a phrase; None where blocks are skipped.

    The instruction multiplies 64 rows of the transpose: of blocks that are fewer columns wide,
    several share it.
    """
    whole = pattern.n == 1 and pattern.width == ROWS
    if whole and HALF % pattern.columns == 0 and pattern.rows % HALF == 0:
        return None
    return f"64 columns of '{pattern}' together keep most of the rows"


@lru_cache(maxsize=1024)
def choose_transposed_layout(rows: int, cols: int) -> Layout:
    """Returns the layout of the packed transpose of a weight [rows, cols]."""
    kept = HALF // CHUNK
    return Layout(cols, rows, HALF, kept, sparse=False, mixed=False, picked=True)


def count_transposed_bytes(rows: int, cols: int) -> int:
    """Returns the bytes of the packed transpose of a weight, whose sizes may be symbolic."""
    return cols // ROWS * (rows // HALF) * choose_transposed_layout(HALF, ROWS).unit_bytes


def pack_transposed(weight: Tensor, blocks: Tensor, pattern: BlockNM, dtype: torch.dtype) -> Tensor:
    """Returns the packed transpose (uint8, 1-D) of what a weight [rows, cols] keeps."""
    layout = choose_transposed_layout(*weight.shape)
    masked = torch.where(expand_blocks(blocks, pattern), weight.detach(), 0).to(dtype)
    # [units, 2, 64, stages, 4 chunks, 2 halves, 8]
    split = masked.t().reshape(layout.units, 2, HALF, layout.stages, layout.kept, 2, 8)
    split = split[:, :, order_rows(mixed=False, device=weight.device)[:HALF]]
    split = split.permute(0, 3, 1, 4, 5, 2, 6)  # [units, stages, 2, chunks, halves, 64, 8]
    picked = _pick(blocks, pattern, layout)
    index = picked.clamp(max=1).long()[:, :, None, None, None, None, None]
    values = split.gather(2, index.expand(-1, -1, -1, *split.shape[3:])).squeeze(2)
    head = F.pad(picked.int().unsqueeze(2), (0, 31)).contiguous().view(torch.uint8)
    return torch.cat([values.contiguous().view(torch.uint8).flatten(2), head], 2).view(-1)


def unpack_transposed(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Returns the masked weight [rows, cols], to the bit."""
    layout = choose_transposed_layout(rows, cols)
    units = packed.view(layout.units, layout.stages, layout.unit_bytes)
    shape = layout.units, layout.stages, 1, layout.kept, 2, HALF, 8
    values = units[..., : layout.value_bytes].contiguous().view(dtype).view(shape)
    picked = units[..., layout.value_bytes :].contiguous().view(torch.int32)[..., 0].long()
    index = picked[:, :, None, None, None, None, None].expand_as(values)
    split = values.new_zeros(*shape[:2], _NONE + 1, *shape[3:]).scatter_(2, index, values)
    ordered = split[:, :, :_NONE].permute(0, 2, 5, 1, 3, 4, 6)
    matrix = torch.empty_like(ordered)
    matrix[:, :, order_rows(mixed=False, device=packed.device)[:HALF]] = ordered
    return matrix.reshape(cols, rows).t()


def _pick(blocks: Tensor, pattern: BlockNM, layout: Layout) -> Tensor:
    """Returns which block of 64 rows each unit of the transpose holds: [units, stages]."""
    strips = blocks[..., 0] * pattern.columns // HALF  # a group is one unit
    return strips.t().repeat_interleave(pattern.rows // HALF, 1)
