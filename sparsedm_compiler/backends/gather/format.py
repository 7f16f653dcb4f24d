"""The packed weight of the gather kernels: its kept columns, and the values of each.

Rows that share a mask, or the rows of a block, are a share: they keep the same columns. First come
the values, [shares, kept, S] in the dtype of the weight, then their columns, ascending, [shares,
kept] in int32; each from a multiple of 16 bytes. Within kept blocks the zeros of a pattern such as
"+2:4" are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ...errors import PackError
from ...patterns import BlockNM, NestedNM, Pattern, SharedNM

TYPES = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes of values and activations, and of a bias, which may be of another."""

_ALIGN = 16
_LEAST = 16  # of rows and kept columns: what a tensor core multiplies at once
_LEAST_RUN, _MOST_RUN = 8, 64  # columns: 16 bytes, which one load copies, and a step of the kernel


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes of a packed weight that its pattern decides.

    Attributes:
        height: S, the rows of a share.
        n: Columns that a group keeps.
        m: Columns of a group.
        run: Kept columns that lie side by side, from a multiple of as many: a power of two; 1
            where they may lie anywhere.
        step: Columns that are kept or pruned together.
    """

    height: int
    n: int
    m: int
    run: int = 1
    step: int = 1

    def count_kept(self, cols: int) -> int:
        """Returns the kept columns of a row."""
        return cols * self.n // self.m


def choose_layout(pattern: Pattern) -> Layout | None:
    """Returns the layout of a pattern's weights; None for a pattern whose rows share no columns.

    >>> choose_layout(Pattern.parse("1:2@64x48"))
    Layout(height=64, n=48, m=96, run=16, step=48)
    """
    if isinstance(pattern, SharedNM):
        return Layout(pattern.height, pattern.n, pattern.m)
    if not isinstance(pattern, (BlockNM, NestedNM)):
        return None
    columns = pattern.columns
    run = min(columns & -columns, _MOST_RUN)
    run = run if run >= _LEAST_RUN else 1
    return Layout(pattern.rows, pattern.n * columns, pattern.width, run, columns)


def require_layout(pattern: Pattern) -> Layout:
    """Returns the layout of a pattern's weights. Raises PackError for one that has none."""
    layout = choose_layout(pattern)
    if layout is None:
        raise PackError(f"{pattern} shares no mask among rows")
    return layout


def why_refused(pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
    """Returns why a weight cannot be packed, as a sentence; None if it can.

    >>> why_refused(Pattern.parse("2:4"), 64, 64, torch.float16)
    '2:4 shares no mask among rows'
    """
    if dtype not in TYPES:
        return f"no gather kernel for {str(dtype).removeprefix('torch.')}"
    layout = choose_layout(pattern)
    if layout is None:
        return f"{pattern} shares no mask among rows"
    if layout.n == layout.m:
        return f"{pattern} keeps everything"
    if layout.height % _LEAST:
        return f"{layout.height} rows that share a mask are no multiple of {_LEAST}"
    if cols % layout.m:
        return f"{cols} columns are not whole groups of {layout.m}"
    if rows % layout.height:
        return f"{rows} rows are not whole shares of {layout.height}"
    if layout.count_kept(cols) < _LEAST:
        return f"{layout.count_kept(cols)} kept columns are fewer than {_LEAST}"
    return None


def pack(weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Returns the packed form (uint8, 1-D) of ``weight * mask``.

    weight, mask: [rows, cols]; ``mask`` is one of ``pattern``. Raises PackError for a weight that
    cannot be packed, and for a mask that is not of the pattern.
    """
    rows, cols = weight.shape
    reason = why_refused(pattern, rows, cols, weight.dtype)
    if reason is not None:
        raise PackError(f"a weight of {list(weight.shape)} cannot be packed to {pattern}: {reason}")
    layout = require_layout(pattern)
    shares = mask.to(torch.bool).reshape(-1, layout.height, cols)
    kept = _find_kept(shares, pattern, layout)
    _, size = _locate_columns(rows, cols, layout, weight.dtype)
    packed = torch.zeros(size, dtype=torch.uint8, device=weight.device)
    values, columns = view_sections(packed, rows, cols, pattern, weight.dtype)
    where = kept.nonzero()[:, 1].view(columns.shape)
    columns.copy_(where)
    blocks = weight.detach().reshape(shares.shape)
    if isinstance(pattern, NestedNM):
        blocks = torch.where(shares, blocks, 0)
    values.copy_(blocks.transpose(1, 2).gather(1, where.unsqueeze(2).expand_as(values)))
    return packed


def _find_kept(shares: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    """Returns the columns that each share keeps, [shares, cols].

    shares: the mask, [shares, S, cols]. Raises PackError if it is not one of the pattern.
    """
    steps = torch.unflatten(shares.any(1), 1, (-1, layout.step)).any(2)
    counts = torch.unflatten(steps, 1, (-1, layout.m // layout.step)).sum(2) * layout.step
    kept = steps.repeat_interleave(layout.step, 1)
    whole = isinstance(pattern, NestedNM) or bool((shares == kept.unsqueeze(1)).all())
    if not whole or bool((counts != layout.n).any()):
        raise PackError(f"the mask is not one of {pattern}")
    return kept


def view_sections(
    packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns views of the values [rows / S, kept, S] and columns [rows / S, kept] in ``packed``.

    Raises PackError for bytes that are not those of a weight of that size, pattern and dtype.
    """
    layout = require_layout(pattern)
    start, end = _locate_columns(rows, cols, layout, dtype)
    plain = packed.dtype is torch.uint8 and packed.dim() == 1 and packed.is_contiguous()
    if not plain or packed.numel() != end or packed.data_ptr() % _ALIGN:
        raise PackError(
            f"the packed weight is not one of {rows} x {cols} to {pattern} in {dtype}, its bytes "
            f"side by side from a multiple of {_ALIGN}"
        )
    shares, kept = rows // layout.height, layout.count_kept(cols)
    count = shares * kept
    values = packed[: count * layout.height * dtype.itemsize].view(dtype)
    columns = packed[start : start + 4 * count].view(torch.int32)
    return values.view(shares, kept, layout.height), columns.view(shares, kept)


def unpack(packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """Returns the masked dense weight [rows, cols], to the bit."""
    values, columns = view_sections(packed, rows, cols, pattern, dtype)
    dense = values.new_zeros(len(values), values.shape[2], cols)
    rows_first = values.transpose(1, 2)
    dense.scatter_(2, columns.long().unsqueeze(1).expand_as(rows_first), rows_first)
    return dense.flatten(0, 1)


def check(packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype) -> None:
    """Raises PackError unless the kernel can run these bytes within their bounds."""
    _, columns = view_sections(packed, rows, cols, pattern, dtype)
    if bool((columns < 0).any()) or bool((columns >= cols).any()):
        raise PackError("the packed weight points outside of its columns")
    runs = torch.unflatten(columns, 1, (-1, require_layout(pattern).run))
    ascending = bool((runs.diff(dim=2) == 1).all())
    if not ascending or bool((runs[..., 0] % runs.shape[2] != 0).any()):
        raise PackError(f"the packed weight keeps columns that are no blocks of {pattern}")


def _locate_columns(rows: int, cols: int, layout: Layout, dtype: torch.dtype) -> tuple[int, int]:
    """Returns where the columns begin and where all ends, in bytes."""
    values = rows * layout.count_kept(cols)
    start = ceil(values * dtype.itemsize / _ALIGN) * _ALIGN
    return start, start + ceil(4 * values // layout.height / _ALIGN) * _ALIGN
