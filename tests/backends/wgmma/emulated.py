"""What wgmma.cu does with the bytes of a packed weight, product by product, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsedm_compiler.backends.wgmma.format import HALF, ROWS, Layout

_TOKENS = 64
"""Tokens of the tile that shared memory holds: boxes of 64 columns lie so many lines apart."""


def emulate(packed: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Returns x W^T: x [tokens, cols] -> [tokens, rows], as the addresses in ``packed`` say."""
    units = packed.view(layout.units, layout.stages, layout.unit_bytes)
    padded = torch.nn.functional.pad(
        x.double(), (0, layout.stages * layout.stage_cols - layout.cols)
    )
    out = torch.zeros(len(x), layout.units * ROWS, dtype=torch.float64)
    for unit in range(layout.units):
        for block in range(2):
            sums = torch.zeros(HALF, len(x), dtype=torch.float64)
            for stage in range(layout.stages):
                if layout.picked and _read_words(units[unit, stage], layout)[0] != block:
                    continue
                for s in range(layout.kept):
                    sums += _multiply(units[unit, stage], padded, layout, stage, block, s, x.dtype)
            for line in range(HALF):
                out[:, unit * ROWS + find_row(line, block, mixed=layout.mixed)] = sums[line]
    return out[:, : layout.rows]


def find_row(line: int, block: int, *, mixed: bool) -> int:
    """The row of a unit whose sums a thread holds for a line of an instruction's 64 x n result.

    Lines g and g + 8 of a warp's 16 are the thread's; write_out puts them side by side.
    """
    warp, high, quad = line // 16, line // 8 % 2, line % 8
    first = 32 * warp + 4 * quad + 2 * block if mixed else 64 * block + 16 * warp + 2 * quad
    return first + high


def _multiply(
    unit: Tensor,
    padded: Tensor,
    layout: Layout,
    stage: int,
    block: int,
    s: int,
    dtype: torch.dtype,
) -> Tensor:
    """One instruction: [64, tokens]."""
    start = ((0 if layout.picked else block * layout.kept) + s) * 2048
    raw = unit[start : start + 2048].clone().view(dtype).double()
    values = torch.empty(HALF, 16, dtype=torch.float64)
    for half in range(2):  # 8 columns; 128 bytes from 8 rows to the next
        values[:, 8 * half : 8 * half + 8] = raw[512 * half : 512 * half + 512].view(HALF, 8)
    chunk = s if layout.picked else int(_read_words(unit, layout)[2 * s + block])
    byte = chunk * layout.chunk * 2
    offset = byte // 128 * (_TOKENS * 128) + byte % 128  # as the descriptor adds it
    box, within = divmod(offset, _TOKENS * 128)
    first = stage * layout.stage_cols + box * 64 + within // 2
    if not layout.sparse:
        return values @ padded[:, first : first + 16].T
    return _expand(unit, values, layout, block, s) @ padded[:, first : first + 32].T


def _read_words(unit: Tensor, layout: Layout) -> Tensor:
    """The words behind the values: chunks, or which block it is."""
    return unit[layout.value_bytes + layout.meta_bytes :].clone().view(torch.int32)


def _expand(unit: Tensor, values: Tensor, layout: Layout, block: int, s: int) -> Tensor:
    """The 64 x 32 operand of a sparse instruction: registers of threads, nibble by nibble."""
    section = unit[layout.value_bytes : layout.value_bytes + layout.meta_bytes].clone()
    words = section.view(torch.int32)
    dense = torch.zeros(HALF, 32, dtype=torch.float64)
    for warp in range(4):
        for lane in range(32):
            if lane % 4 // 2 != s % 2:  # the selector: threads 0, 1 or 2, 3 of a quad
                continue
            pair = lane % 2
            if layout.kept == 1:
                index = warp * 16 + lane // 4 * 2 + pair
            else:
                index = (s // 2 * 4 + warp) * 32 + lane
            word = int(words[2 * index + block])
            for nibble in range(8):
                line = 16 * warp + lane // 4 + 8 * (nibble // 4)
                four = 4 * pair + nibble % 4
                bits = word >> (4 * nibble) & 15
                dense[line, 4 * four + (bits & 3)] += values[line, 2 * four]
                dense[line, 4 * four + (bits >> 2)] += values[line, 2 * four + 1]
    return dense
