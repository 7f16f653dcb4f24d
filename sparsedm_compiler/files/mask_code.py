"""Masks as bytes: what a pattern leaves open, group by group, as one number each.

A weight [out, in, *kernel] is read as rows [out, *kernel, in]. A pattern is up to two choices: of
every m blocks of R rows by C columns, n; and, along what those left of a row, n of every m. Every
choice is a number below C(m, n). A 4x4 tile of a transposable pattern is its index among the legal
masks. A pattern of any other kind is a bit per weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import comb, prod

import torch
from torch import Tensor

from ..errors import PackError
from ..patterns import NM, VNM, BlockNM, NestedNM, Pattern, SharedNM, TransposableNM
from ..patterns.vnm import SHARED_COLUMNS
from ..selection.transposable_tiles import TILE, select_tiles
from .digits import MOST, count_bytes, pack_digits, unpack_digits
from .subset_rank import rank_subsets, unrank_subsets

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of a pattern.

    Attributes:
        outer: (n, m) of blocks.
        rows: Rows of a block.
        columns: Columns of a block.
        inner: (n, m) along the kept columns of a row; None: all are kept.
    """

    outer: tuple[int, int]
    rows: int = 1
    columns: int = 1
    inner: tuple[int, int] | None = None


def list_choices(pattern: Pattern) -> Choices | None:
    """Returns the choices of a pattern; None for a kind that has no such form."""
    if isinstance(pattern, NM):
        return Choices((pattern.n, pattern.m))
    if isinstance(pattern, SharedNM):
        return Choices((pattern.n, pattern.m), pattern.rows)
    if isinstance(pattern, BlockNM):
        return Choices((pattern.n, pattern.m), pattern.rows, pattern.columns)
    if isinstance(pattern, NestedNM):
        inner = (pattern.inner.n, pattern.inner.m)
        return Choices((pattern.n, pattern.m), pattern.rows, pattern.columns, inner)
    if isinstance(pattern, VNM):
        inner = (pattern.n, SHARED_COLUMNS)
        return Choices((SHARED_COLUMNS, pattern.m), pattern.rows, 1, inner)
    return None


def count_kept(pattern: Pattern, shape: Shape) -> int:
    """Returns how many weights of a shape that it fits a pattern keeps."""
    return int(prod(shape) * pattern.density)


def count_digits(pattern: Pattern, shape: Shape) -> list[tuple[int, int]]:
    """Returns (count, base) of the numbers that describe a mask, in the order of the bytes."""
    size = prod(shape)
    if isinstance(pattern, TransposableNM):
        return [(size // TILE**2, len(_list_tiles(pattern.n)))]
    choices = list_choices(pattern)
    if choices is None:
        return [(size, 2)]
    n, m = choices.outer
    counts = [_count_choice(size // (choices.rows * choices.columns * m), n, m)]
    if choices.inner is not None:
        counts.append(_count_choice(size * n // m // choices.inner[1], *choices.inner))
    return counts


def _count_choice(groups: int, n: int, m: int) -> tuple[int, int]:
    base = comb(m, n)
    return (groups, base) if base <= MOST else (groups * m, 2)


def count_mask_bytes(pattern: Pattern, shape: Shape) -> int:
    """Returns the size of ``encode_mask`` of any mask of that pattern and shape."""
    return sum(count_bytes(count, base) for count, base in count_digits(pattern, shape))


def complete_mask(kept: Tensor, pattern: Pattern) -> Tensor:
    """Returns a mask of the pattern that keeps all of ``kept``: bool [out, in, *kernel].

    Raises PackError if there is none.
    """
    if isinstance(pattern, TransposableNM):
        mask = select_tiles(kept.float(), pattern.n)
    else:
        choices = list_choices(pattern)
        if choices is None:
            return pattern.compute_mask(kept.float())
        mask = _to_weight(_complete(_to_rows(kept), choices), kept.shape)
    if (kept & ~mask).any():
        raise PackError(f"the zeros do not satisfy '{pattern}'")
    return mask


def encode_mask(mask: Tensor, pattern: Pattern) -> Tensor:
    """Returns the bytes of a mask of the pattern (``complete_mask``): uint8."""
    shape = tuple(mask.shape)
    counts = count_digits(pattern, shape)
    numbers = _count_numbers(_to_rows(mask), pattern)
    parts = [pack_digits(n, base) for n, (_, base) in zip(numbers, counts, strict=True)]
    return torch.cat(parts)


def decode_mask(data: Tensor, pattern: Pattern, shape: Shape) -> Tensor:
    """Returns the mask of these bytes: bool [out, in, *kernel].

    Raises:
        PackError: If there are more or fewer bytes than ``count_mask_bytes``, or a number is out of
            range.
    """
    if data.dtype != torch.uint8 or data.numel() != count_mask_bytes(pattern, shape):
        raise PackError(
            f"{data.numel()} indices of {data.dtype}, not the {count_mask_bytes(pattern, shape)} "
            f"bytes of '{pattern}' for a weight of {list(shape)}"
        )
    numbers, start = [], 0
    for count, base in count_digits(pattern, shape):
        end = start + count_bytes(count, base)
        numbers.append(unpack_digits(data.flatten()[start:end], count, base))
        start = end
    mask = _to_weight(_draw(numbers, pattern, shape), torch.Size(shape))
    if list_choices(pattern) is None and int(mask.sum()) != count_kept(pattern, shape):
        raise PackError(f"the bits keep {int(mask.sum())} weights, which is not '{pattern}'")
    return mask


def _to_rows(tensor: Tensor) -> Tensor:
    """Returns [out, in, *kernel] as [out, positions of the kernel, in], contiguous."""
    return tensor.movedim(1, -1).reshape(tensor.shape[0], prod(tensor.shape[2:]), tensor.shape[1])


def _to_weight(rows: Tensor, shape: torch.Size) -> Tensor:
    """Returns what ``_to_rows`` made in the shape of the weight again."""
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def _view_blocks(rows: Tensor, choices: Choices) -> Tensor:
    """Views [out, k, in] as [out / R, R, k, groups, m, C]."""
    m, height, columns = choices.outer[1], choices.rows, choices.columns
    out, positions, width = rows.shape
    return rows.view(out // height, height, positions, width // (m * columns), m, columns)


def _complete(kept: Tensor, choices: Choices) -> Tensor:
    """Returns ``kept`` [out, k, in] with the lowest zeros added that make every choice full."""
    blocks = _view_blocks(kept, choices)
    outer = _fill(blocks.any(-1).any(1), choices.outer[0])
    mask = outer.unsqueeze(1).unsqueeze(-1).expand(blocks.shape).clone().view(kept.shape)
    if choices.inner is not None:
        n, m = choices.inner
        mask[mask.clone()] = _fill(kept[mask].view(-1, m), n).flatten()
    return mask


def _fill(kept: Tensor, n: int) -> Tensor:
    """Returns a mask of the n first of every group [..., m]: those that are kept, then others."""
    m = kept.shape[-1]
    order = torch.arange(m, dtype=torch.int32, device="cpu") + m * (~kept).to(torch.int32)
    picked = order.topk(n, dim=-1, largest=False).indices
    return torch.zeros_like(kept).scatter_(-1, picked, True)


def _count_numbers(mask: Tensor, pattern: Pattern) -> list[Tensor]:
    """Returns the numbers that describe the mask [out, k, in], as ``count_digits`` counts them."""
    if isinstance(pattern, TransposableNM):
        return [_index_tiles(mask, pattern.n)]
    choices = list_choices(pattern)
    if choices is None:
        return [mask.flatten().to(torch.int64)]
    chosen = _view_blocks(mask, choices).any(-1).any(1)
    if choices.inner is None:
        return [_rank(chosen, *choices.outer)]
    chosen = _fill(chosen, choices.outer[0])  # of V:n:m, a column that no row has kept
    blocks = _view_blocks(mask, choices)
    outer = chosen.unsqueeze(1).unsqueeze(-1).expand(blocks.shape).reshape(mask.shape)
    inner = mask[outer].view(-1, choices.inner[1])
    return [_rank(chosen, *choices.outer), _rank(inner, *choices.inner)]


def _rank(kept: Tensor, n: int, m: int) -> Tensor:
    kept = kept.reshape(-1, m)
    return rank_subsets(kept, n) if comb(m, n) <= MOST else kept.flatten().to(torch.int64)


def _unrank(numbers: Tensor, n: int, m: int) -> Tensor:
    if comb(m, n) <= MOST:
        return unrank_subsets(numbers, n, m)
    kept = numbers.view(-1, m).bool()
    if (kept.sum(1) != n).any():
        raise PackError(f"the bits of a group do not keep {n} of {m}")
    return kept


def _draw(numbers: list[Tensor], pattern: Pattern, shape: Shape) -> Tensor:
    """Returns the mask [out, k, in] that numbers describe."""
    rows = torch.empty(shape[0], prod(shape[2:]), shape[1], dtype=torch.bool, device="cpu")
    if isinstance(pattern, TransposableNM):
        return _draw_tiles(numbers[0], pattern.n, rows)
    choices = list_choices(pattern)
    if choices is None:
        return numbers[0].bool().view(rows.shape)
    blocks = _view_blocks(rows, choices)
    chosen = _unrank(numbers[0], *choices.outer).view(blocks[:, 0, ..., 0].shape)
    blocks.copy_(chosen.unsqueeze(1).unsqueeze(-1).expand(blocks.shape))
    if choices.inner is not None:
        rows[rows.clone()] = _unrank(numbers[1], *choices.inner).flatten()
    return rows


@lru_cache(maxsize=4)
def _list_tiles(n: int) -> Tensor:
    """Returns the legal tiles as 16-bit numbers, ascending; bit 4 r + c is row r, column c."""
    rows = [sum(1 << column for column in kept) for kept in combinations(range(TILE), n)]
    legal = [
        sum(row << TILE * index for index, row in enumerate(tile))
        for tile in product(rows, repeat=TILE)
        if all(sum(row >> column & 1 for row in tile) == n for column in range(TILE))
    ]
    return torch.tensor(sorted(legal), device="cpu")


def _view_tiles(rows: Tensor) -> Tensor:
    """Returns [out, k, in] as [out / 4, k, in / 4, 4, 4], a view."""
    out, positions, width = rows.shape
    tiles = rows.view(out // TILE, TILE, positions, width // TILE, TILE)
    return tiles.permute(0, 2, 3, 1, 4)


def _index_tiles(mask: Tensor, n: int) -> Tensor:
    bits = 1 << torch.arange(TILE * TILE, device="cpu")
    codes = (_view_tiles(mask).reshape(-1, TILE * TILE) * bits).sum(1)
    return torch.searchsorted(_list_tiles(n), codes)


def _draw_tiles(numbers: Tensor, n: int, rows: Tensor) -> Tensor:
    codes = _list_tiles(n)[numbers].unsqueeze(1)
    tiles = _view_tiles(rows)
    tiles.copy_((codes >> torch.arange(TILE * TILE, device="cpu") & 1).bool().view(tiles.shape))
    return rows
