"""Linear layers of which many rows keep the same columns: a dense product over those.

The columns lie anywhere where rows share a mask, and in runs where whole blocks are kept, which are
read and copied 16 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import KernelError
from ...patterns import Pattern
from ...triton_support import is_interpreted, on_device_of
from ..cuda.finish import finish_sums
from ..custom_op import apply_activation, fake_linear, register
from .format import TYPES, Layout, require_layout, view_sections

SCHEMA = "str act, str pattern, int[] tile"
"""The arguments of the op behind ``rows``: the activation, the pattern as text, a ``Tile``."""

_GROUP = 8
_WARPGROUP = 64
"""What Hopper's tensor cores multiply at once of the first operand."""


class Tile(NamedTuple):
    """The cut of the Triton kernel: what a program computes at a time.

    Attributes:
        tokens: Tokens of the output: a power of two of at least 16, as the two below.
        rows: Rows of one share.
        k: Kept columns of a step.
        warps: Warps of a program.
        stages: Steps that are loaded ahead.
        swapped: 1 to multiply values by x, so that the rows come first; pays on Hopper alone.
        splits: Parts of the sum over columns, each of a program of its own; a second kernel adds
            them up.
    """

    tokens: int
    rows: int
    k: int
    warps: int
    stages: int
    swapped: int = 0
    splits: int = 1

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Returns the shared memory that the steps loaded ahead take, about all of a program's.

        Triton loads half of the stages ahead, since the columns come before x.
        """
        steps = max(2, (self.stages + 1) // 2)
        return steps * (self.k * (self.tokens + self.rows) * dtype.itemsize + 4 * self.k)


def list_tiles(layout: Layout, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Returns the few tiles worth measuring on a shape, for long inputs, then for short ones."""
    exact = dtype is torch.float32  # by the ordinary units, not the tensor cores
    rows = min(64 if exact else 128, 1 << (layout.height - 1).bit_length())
    if exact:
        return Tile(64, rows, 32, 4, 3), Tile(128, rows, 32, 8, 3), Tile(16, rows, 64, 4, 3)
    if layout.run == 1:
        return (
            *(Tile(128, rows, 64, 8, 3), Tile(128, rows, 32, 8, 4)),
            *(Tile(64, rows, 64, 4, 3), Tile(64, rows, 32, 4, 4), Tile(16, rows, 128, 4, 3)),
        )
    tiles = [Tile(256, rows, 64, 8, 5), Tile(128, rows, 64, 4, 5), Tile(128, rows, 64, 8, 7)]
    if rows >= _WARPGROUP:
        warps = 4 * rows // _WARPGROUP
        tiles.insert(0, Tile(256, rows, 64, warps, 5, swapped=1))
        tiles.append(Tile(16, rows, 64, 4, 7, swapped=1, splits=4))
    return *tiles, Tile(64, rows, 64, 4, 5, splits=3), Tile(16, rows, 64, 4, 5, splits=4)


def reference_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    pattern: str,
    tile: Sequence[int],
) -> Tensor:
    """Returns the result of ``run_linear``, in plain torch: sums in float32, rounded once."""
    values, columns = view_sections(packed, rows, x.shape[-1], Pattern.parse(pattern), x.dtype)
    parts = [
        x[..., column].float() @ value.float()
        for column, value in zip(columns.long(), values, strict=True)
    ]
    sums = torch.cat(parts, dim=-1)
    if bias is not None:
        sums = sums + bias.float()
    return apply_activation(sums, act).to(x.dtype)


def run_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    pattern: str,
    tile: Sequence[int],
) -> Tensor:
    """Returns act(W x + b) by the Triton kernel.

    x: [..., cols] of the packed dtype, of any strides -> [..., rows], contiguous. ``act``: one of
    ACTS. Raises KernelError for a bias that is not one value for each row.
    """
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in TYPES):
        raise KernelError(
            f"a bias of {list(bias.shape)} in {bias.dtype} is not a number for each of {rows} rows"
        )
    flat = x.detach().reshape(-1, x.shape[-1])
    out = x.new_empty(len(flat), rows)
    if out.numel():
        parsed, cut = Pattern.parse(pattern), Tile(*tile)
        sections = view_sections(packed, rows, x.shape[-1], parsed, x.dtype)
        plain = None if bias is None else bias.detach().contiguous()
        run = require_layout(parsed).run
        if cut.splits == 1:
            _launch((flat, *sections, plain, out), run, act, cut)
        else:
            sums = x.new_empty(cut.splits, *out.shape, dtype=torch.float32)
            _launch((flat, *sections, None, sums), run, "none", cut)
            finish_sums(sums, None, plain, act, out)
    return out.view(*x.shape[:-1], rows)


def _launch(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], run: int, act: str, tile: Tile
) -> None:
    """Fills the output, the last of ``tensors``, in the order of the kernel's arguments."""
    from .triton_kernels import gather_kernel

    x, values, _, _, out = tensors
    *_, tokens, rows = out.shape
    _, kept, share = values.shape
    programs = ceil(tokens / tile.tokens) * len(values) * ceil(share / tile.rows)
    reach = tile.tokens * x.stride(0) + x.shape[1] * x.stride(1)
    with on_device_of(x):
        gather_kernel[(programs, tile.splits)](
            *tensors,
            *(tokens, rows, kept, *x.stride()),
            EVEN=kept % tile.k == 0,
            S=share,
            RUN=min(run, tile.k),
            ACT=act,
            BLOCK_TOKENS=tile.tokens,
            BLOCK_ROWS=tile.rows,
            BLOCK_K=tile.k,
            SWAPPED=bool(tile.swapped),
            SPLITS=tile.splits,
            GROUP=_GROUP,
            WIDE=reach >= 1 << 31,
            UPCAST=is_interpreted(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


gather_linear_op = register(
    "gather_linear",
    SCHEMA,
    {"CPU": reference_linear, "CUDA": run_linear},
    fake=fake_linear,
    reference=reference_linear,
)
