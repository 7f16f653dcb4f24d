"""Launches the Triton kernels of training on blocks."""

from __future__ import annotations

from functools import cache, lru_cache
from math import ceil

import torch
from torch import Tensor

from ...patterns import BlockNM
from ...triton_support import is_interpreted, on_device_of
from ..cuda.device import find_device
from .format import CHUNK, choose_layout
from .transposed import choose_transposed_layout

_MOST_SHARES = 8
_LEAST_TOKENS = 256
"""Tokens of a share: with fewer, adding shares up costs more than it wins."""

Cut = tuple[int, int, int, int, int, int]
"""Rows, columns and tokens of a tile of the gradient of a weight, warps, stages, shares."""


def pack_weight(weight: Tensor, blocks: Tensor, pattern: BlockNM, dtype: torch.dtype) -> Tensor:
    """Returns ``format.pack`` of what a weight [rows, cols] keeps, cast to ``dtype``."""
    from .triton_kernels import pack_kernel

    rows, cols = weight.shape
    layout = choose_layout(pattern, rows, cols)
    programs = layout.units * layout.stages
    packed = weight.new_empty(programs * layout.unit_bytes, dtype=torch.uint8)
    with on_device_of(weight):
        pack_kernel[(programs,)](
            weight,
            blocks,
            packed.view(dtype),
            packed.view(torch.int32),
            *(weight.stride(0), rows, blocks.shape[1], layout.stages),
            R=pattern.rows,
            C=pattern.columns,
            M=pattern.m,
            N=pattern.n,
            STAGE_COLS=layout.stage_cols,
            KEPT=layout.kept,
            KEPT_COLS=64 if layout.kept == 3 else layout.kept * CHUNK,
            MIXED=layout.mixed,
            num_warps=4,
        )
    return packed


def pack_transposed_weight(
    weight: Tensor, blocks: Tensor, pattern: BlockNM, dtype: torch.dtype
) -> Tensor:
    """Returns ``transposed.pack_transposed`` of a weight [rows, cols]."""
    from .triton_kernels import pack_transposed_kernel

    layout = choose_transposed_layout(*weight.shape)
    programs = layout.units * layout.stages
    packed = weight.new_empty(programs * layout.unit_bytes, dtype=torch.uint8)
    with on_device_of(weight):
        pack_transposed_kernel[(programs,)](
            weight,
            blocks,
            packed.view(dtype),
            packed.view(torch.int32),
            *(weight.stride(0), blocks.shape[1], layout.stages),
            R=pattern.rows,
            C=pattern.columns,
            num_warps=4,
        )
    return packed


def compute_weight_gradient(
    grad: Tensor, x: Tensor, blocks: Tensor, pattern: BlockNM, cut: Cut | None = None
) -> Tensor:
    """Returns the gradient of a weight in float32: [rows, cols], zero where a block is pruned.

    grad: [tokens, rows], x: [tokens, cols], with columns side by side in memory. ``cut``: None for
    the usual one. Shares of tokens are added up in no fixed order, but under
    ``torch.use_deterministic_algorithms``.
    """
    from .triton_kernels import weight_gradient_kernel

    (tokens, rows), cols = grad.shape, x.shape[1]
    kept = blocks.shape[1] * pattern.n * pattern.columns
    cut = cut or choose_cut(tokens, rows, kept, pattern.rows, _count_multiprocessors())
    block_rows, block_cols, block_tokens, num_warps, num_stages, shares = cut
    if torch.are_deterministic_algorithms_enabled():
        shares = 1
    share_tokens = ceil(ceil(tokens / shares) / block_tokens) * block_tokens
    out = torch.zeros(rows, cols, dtype=torch.float32, device=grad.device)
    if not tokens:
        return out
    tiles = rows // block_rows * ceil(kept / block_cols)
    with on_device_of(grad):
        weight_gradient_kernel[(tiles, ceil(tokens / share_tokens))](
            *(grad, x, blocks, out, tokens, grad.stride(0), x.stride(0)),
            *(cols, blocks.shape[1], share_tokens),
            R=pattern.rows,
            C=pattern.columns,
            M=pattern.m,
            N=pattern.n,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            BLOCK_TOKENS=block_tokens,
            EVEN=tokens % block_tokens == 0,
            ATOMIC=tokens > share_tokens,
            WIDE=tokens * max(grad.stride(0), x.stride(0)) >= 1 << 31,
            UPCAST=is_interpreted(),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out


@lru_cache(maxsize=1024)
def choose_cut(tokens: int, rows: int, kept: int, height: int, multiprocessors: int) -> Cut:
    """Returns the usual cut of a gradient: large tiles, and shares that fill a device twice.

    Args:
        tokens: Tokens of x.
        rows: Rows of the weight.
        kept: Columns that each of them keeps.
        height: Rows of a block.
        multiprocessors: Those of the device.
    """
    block_rows = 128 if height % 128 == 0 else 64
    block_cols = 128 if kept >= 96 else 64 if kept >= 48 else 32 if kept > 16 else 16
    block_tokens = 64 if tokens >= 64 else 16
    tiles = rows // block_rows * ceil(kept / block_cols)
    shares = max(1, min(_MOST_SHARES, 2 * multiprocessors // tiles, tokens // _LEAST_TOKENS))
    num_warps = 8 if block_rows * block_cols >= 128 * 128 else 4
    return block_rows, block_cols, block_tokens, num_warps, 3, shares


@cache
def _count_multiprocessors() -> int:
    device = find_device()
    return 132 if device is None else device.multiprocessors
