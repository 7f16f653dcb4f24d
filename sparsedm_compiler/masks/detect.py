"""Detection of the N:M pattern that the zeros of a weight already satisfy."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from itertools import product

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..packed_tensors import explain_packed
from ..patterns import NM, BlockNM, NestedNM, Pattern, SharedNM

_GROUP_SIZES = (2, 4, 8, 16, 32, 64)
_SHARED_ROWS = (128, 64, 32, 16, 8, 4, 2)
_BLOCK_ROWS, _BLOCK_COLUMNS, _BLOCK_GROUPS = (16, 32, 64, 128), (8, 16, 32), (2, 4, 8, 16)


def detect_pattern(weight: Tensor) -> Pattern | None:
    """Returns the sparsest N:M pattern that keeps every non-zero of a weight.

    Groups of 2, 4, 8, 16, 32 and 64 are tried. Of equally sparse patterns the one with the
    smallest groups is returned. If 2, 4, ... or 128 consecutive rows have their zeros in the same
    columns, the pattern shares its mask among the largest such number of rows. Where whole blocks
    of 16, 32, 64 or 128 rows by 8, 16 or 32 columns are zero, patterns of 2, 4, 8 or 16 such blocks
    are tried too, alone and with N:M within them: one that is as sparse is preferred, of those
    one of whole blocks, then the one with the smallest groups within them, then the largest blocks.

    Args:
        weight: [out, in] or [out, in, *kernel]; groups run along ``in``.

    Returns:
        An ``NM``, ``SharedNM``, ``BlockNM`` or ``NestedNM`` pattern. None if the zeros satisfy no
        pattern, if nothing is zero or everything is, and for a meta tensor, a fake tensor, one
        that a library has packed or quantized, or a tensor of one dimension.

    Example:
        >>> detect_pattern(torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0]]))
        NM(n=2, m=4)
    """
    if weight.dim() < 2 or weight.is_meta or isinstance(weight, FakeTensor):
        return None
    if explain_packed(weight) is not None:
        return None
    kept = (weight.detach() != 0).movedim(1, -1)
    if not kept.any():
        return None
    per_row = _detect_per_row(kept)
    best = min(per_row, key=lambda pattern: (pattern.density, pattern.m), default=None)
    whole = _detect_blocks(kept)
    blocks: list[BlockNM | NestedNM] = [*whole, *_nest(whole, per_row)]
    block = min(blocks, key=_rank, default=None)
    if block is not None and (best is None or block.density <= best.density):
        return block
    return None if best is None else _share_rows(best, kept.flatten(1))


def _detect_per_row(kept: Tensor) -> list[NM]:
    """Returns the per-row patterns that keep all of ``kept``: [out, *kernel, in], not all False."""
    patterns = []
    for m in _GROUP_SIZES:
        if kept.shape[-1] % m == 0:
            n = int(kept.reshape(-1, m).sum(1).max())
            if n < m:
                patterns.append(NM(n, m))
    return patterns


def _share_rows(pattern: NM, kept: Tensor) -> NM | SharedNM:
    """Returns the pattern with its mask shared by as many rows as are alike; kept: [out, ...]."""
    for rows in _SHARED_ROWS:
        if kept.shape[0] % rows == 0:
            blocks = kept.view(-1, rows, kept.shape[1])
            if torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
                return SharedNM(pattern.n, pattern.m, rows)
    return pattern


def _detect_blocks(kept: Tensor) -> list[BlockNM]:
    """Returns the block patterns that keep all of ``kept``: [out, *kernel, in], not all False."""
    patterns = []
    for rows, columns in product(_BLOCK_ROWS, _BLOCK_COLUMNS):
        if kept.shape[0] % rows or kept.shape[-1] % columns:
            continue
        used = torch.unflatten(kept, -1, (-1, columns)).any(-1)
        used = torch.unflatten(used, 0, (-1, rows)).any(1)
        if used.all():
            continue
        for m in _BLOCK_GROUPS:
            if used.shape[-1] % m == 0:
                n = int(used.reshape(-1, m).sum(1).max())
                if n < m:
                    patterns.append(BlockNM(n, m, rows, columns))
    return patterns


def _nest(blocks: list[BlockNM], per_row: list[NM]) -> list[NestedNM]:
    """Returns the patterns of blocks with per-row groups that lie whole in them."""
    return [
        NestedNM(block.n, block.m, block.rows, block.columns, inner)
        for block, inner in product(blocks, per_row)
        if block.columns % inner.m == 0
    ]


def _rank(block: BlockNM | NestedNM) -> tuple[Fraction, int, int, int]:
    """Returns the sort key of the patterns that are satisfied, the best first."""
    inner = block.inner.m if isinstance(block, NestedNM) else 1
    return block.density, inner, -block.rows * block.columns, block.m


def detect_patterns(weights: Iterable[tuple[str, Tensor]]) -> tuple[tuple[str, Pattern], ...]:
    """Returns (name, pattern) of those of the named weights that satisfy a pattern."""
    patterns = ((name, detect_pattern(weight)) for name, weight in weights)
    return tuple((name, pattern) for name, pattern in patterns if pattern is not None)
