"""The Triton kernels of training on blocks: packing, and the gradient of kept weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    weight,
    blocks,
    values,
    words,
    stride,
    rows,
    groups,
    stages,
    R: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGE_COLS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_COLS: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Writes a unit of a packed weight (format.py): 128 rows of a stage.

    ``values`` and ``words`` are the same memory, as the dtype of the product and as int32.
    KEPT_COLS: the kept columns of a stage as a power of two.
    """
    unit, stage = tl.program_id(0) // stages, tl.program_id(0) % stages
    UNIT: tl.constexpr = 2 * KEPT * 2048 + 128
    values += tl.program_id(0).to(tl.int64) * (UNIT // 2)
    words += tl.program_id(0).to(tl.int64) * (UNIT // 4) + KEPT * 1024
    word = tl.arange(0, 32)
    tl.store(words + word, word * 0, mask=word >= 2 * KEPT)
    line = tl.arange(0, 64)
    pair, quad = 16 * (line // 16), line % 8
    q = tl.arange(0, KEPT_COLS)
    eight, chunk = tl.arange(0, KEPT_COLS // 8), tl.arange(0, 4)
    for block in tl.static_range(2):
        if MIXED:
            row, share = 2 * pair + 4 * quad + 2 * block, unit * 128 // R
        else:
            row, share = 64 * block + pair + 2 * quad, (unit * 128 + 64 * block) // R
        row += unit * 128 + line % 16 // 8
        chosen = blocks + share * groups * N
        has_rows = share * R < rows
        group = stage * (STAGE_COLS // (M * C)) + q // (N * C)
        inside = (q < KEPT * 16) & (group < groups) & has_rows
        column = _find_column(chosen, q, inside, group, C, M, N)
        column = tl.max_contiguous(tl.multiple_of(column, 16), 16)  # whole runs of C
        at = row[:, None] * stride + column[None, :]
        tile = tl.load(weight + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        tile = tl.reshape(tile.to(values.dtype.element_ty), (64, KEPT_COLS // 8, 8))
        where = block * (KEPT * 1024) + eight[None, :, None] * 512 + line[:, None, None] * 8
        where += tl.arange(0, 8)[None, None, :]
        tl.store(values + where, tile, mask=(eight < KEPT * 2)[None, :, None])
        group = stage * (STAGE_COLS // (M * C)) + chunk * 16 // (N * C)
        inside = (chunk < KEPT) & (group < groups) & has_rows
        begin = _find_column(chosen, chunk * 16, inside, group, C, M, N)
        number = (begin - stage * STAGE_COLS) // 16
        tl.store(words + chunk * 2 + block, number, mask=chunk < KEPT)


@triton.jit
def _find_column(chosen, q, inside, group, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Returns the columns of the weight that are the q-th that a stage keeps, by their group."""
    number = tl.load(chosen + group * N + q % (N * C) // C, mask=inside, other=0)
    return group * (M * C) + number * C + q % C


@triton.jit
def pack_transposed_kernel(
    weight,
    blocks,
    values,
    words,
    stride,
    groups,
    stages,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Writes a unit of a packed transpose (transposed.py): a group of 128 columns by 64 rows."""
    UNIT: tl.constexpr = 8192 + 128
    unit, stage = tl.program_id(0) // stages, tl.program_id(0) % stages
    values += tl.program_id(0).to(tl.int64) * (UNIT // 2)
    words += tl.program_id(0).to(tl.int64) * (UNIT // 4) + 2048
    first = tl.load(blocks + stage * 64 // R * groups + unit) * C
    strip = first // 64
    word = tl.arange(0, 32)
    tl.store(words + word, tl.where(word == 0, strip, 0))
    row, column = tl.arange(0, 64), strip * 64 + tl.arange(0, 64)
    at = (stage * 64 + row)[:, None] * stride + (unit * 128 + column)[None, :]
    inside = (column >= first) & (column < first + C)
    tile = tl.load(weight + at, mask=inside[None, :], other=0.0).to(values.dtype.element_ty)
    turned = tl.permute(tl.reshape(tile, (8, 8, 64)), (2, 0, 1))  # [columns, eights of rows, 8]
    column = tl.arange(0, 64)
    line = 16 * (column // 16) + 8 * (column % 2) + column % 16 // 2
    eight = tl.arange(0, 8)
    where = line[:, None, None] * 8 + eight[None, :, None] * 512 + eight[None, None, :]
    tl.store(values + where, turned)


@triton.jit
def weight_gradient_kernel(
    grad,
    x,
    blocks,
    out,
    tokens,
    grad_stride,
    x_stride,
    cols,
    groups,
    share_tokens,
    R: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    ATOMIC: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Computes out[r, c] = sum over tokens of grad[t, r] x[t, c], for kept c, in float32.

    A program takes BLOCK_ROWS rows of one row of blocks, BLOCK_COLS of the columns they keep, and
    ``share_tokens`` tokens. EVEN says that tokens come in whole BLOCK_TOKENS.
    """
    kept = groups * (N * C)
    col_tiles = tl.cdiv(kept, BLOCK_COLS)
    row_tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    q = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = q < kept
    q = tl.where(inside, q, q - kept)  # any others: loads need no mask, and stay vectors
    chosen = blocks + row_tile * BLOCK_ROWS // R * groups * N
    column = q // (N * C) * (M * C) + tl.load(chosen + q // C) * C + q % C
    column = tl.max_contiguous(tl.multiple_of(column, 16), 16)  # whole runs of C
    begin = tl.program_id(1) * share_tokens
    end = tl.minimum(begin + share_tokens, tokens)
    token = begin + tl.arange(0, BLOCK_TOKENS)
    if WIDE:
        token = token.to(tl.int64)
    grad += token[:, None] * grad_stride + row[None, :]
    x += token[:, None] * x_stride + column[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(begin, end, BLOCK_TOKENS):
        if EVEN:
            g = tl.load(grad)
            a = tl.load(x)
        else:
            has = (start + tl.arange(0, BLOCK_TOKENS) < end)[:, None]
            g = tl.load(grad, mask=has, other=0.0)
            a = tl.load(x, mask=has, other=0.0)
        if UPCAST:  # Triton's interpreter would multiply bfloat16 as integers
            g, a = g.to(tl.float32), a.to(tl.float32)
        sums = tl.dot(tl.trans(g), a, sums)
        grad += BLOCK_TOKENS * grad_stride
        x += BLOCK_TOKENS * x_stride
    out += row[:, None] * cols + column[None, :]
    if ATOMIC:
        tl.atomic_add(out, sums, mask=inside[None, :], sem="relaxed")
    else:
        tl.store(out, sums.to(out.dtype.element_ty), mask=inside[None, :])
