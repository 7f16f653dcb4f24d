"""The Triton kernel of the gather ops: products over the columns that a block of rows keeps."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cuda.triton_kernels import apply_activation


@triton.jit
def gather_kernel(
    x,
    values,
    columns,
    bias,
    out,
    tokens,
    rows,
    kept,
    x_token,
    x_feature,
    EVEN: tl.constexpr,
    S: tl.constexpr,
    RUN: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Computes a tile of out, the activated sums of products over gathered columns.

    out[t, r] = ACT(sum over k of x[t, columns[r / S, k]] * values[r / S, k, r % S] + bias[r]).

    A program computes BLOCK_TOKENS tokens of BLOCK_ROWS rows that share their columns; ``bias`` is
    None or a pointer; EVEN says that ``kept`` is a multiple of BLOCK_K; columns come in runs of
    RUN, from a multiple of it. SWAPPED multiplies values by x, so that rows come first. Of SPLITS
    parts of the sum, out[split, t, r] gets one. Sums, bias and activation are in float32.
    """
    token_block, row_block = _assign_block(tokens, rows, S, BLOCK_TOKENS, BLOCK_ROWS, GROUP)
    parts: tl.constexpr = (S + BLOCK_ROWS - 1) // BLOCK_ROWS
    share = (row_block // parts).to(tl.int64)
    within = row_block % parts * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = token_block.to(tl.int64) * BLOCK_TOKENS
    token = tl.arange(0, BLOCK_TOKENS)
    k = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(kept, BLOCK_K), SPLITS) * BLOCK_K
    begin = tl.program_id(1) * steps
    end = tl.minimum(begin + steps, kept)
    columns += share * kept + begin + k
    values += (share * kept + begin) * S + k[:, None] * S + within[None, :]
    x += first * x_token
    at = token.to(tl.int64 if WIDE else tl.int32) * x_token
    has_token, has_row = token < tokens - first, within < S
    if SWAPPED:
        sums = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), dtype=tl.float32)
    else:
        sums = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        has_k = k < end - start
        if EVEN:
            has_k = k < BLOCK_K
        column = tl.load(columns, mask=has_k, other=0)
        if RUN > 1:
            column = tl.max_contiguous(tl.multiple_of(column, RUN), RUN)
            picked = _load_runs(x, at, column.to(at.dtype) * x_feature, has_token, has_k)
        else:
            picked = _load_columns(x, at, column, x_feature, has_token, has_k)
        value = tl.load(values, mask=has_k[:, None] & has_row[None, :], other=0.0)
        if UPCAST:  # Triton's interpreter would multiply bfloat16 as integers
            picked, value = picked.to(tl.float32), value.to(tl.float32)
        if SWAPPED:
            sums = tl.dot(tl.trans(value), tl.trans(picked), sums, input_precision="ieee")
        else:
            sums = tl.dot(picked, value, sums, input_precision="ieee")
        columns += BLOCK_K
        values += BLOCK_K * S
    row = share * S + within
    if bias is not None:
        added = tl.load(bias + row, mask=has_row, other=0.0).to(tl.float32)
        sums += added[:, None] if SWAPPED else added[None, :]
    result = apply_activation(sums, ACT).to(out.dtype.element_ty)
    if SWAPPED:
        result = tl.trans(result)
    out += tl.program_id(1).to(tl.int64) * tokens * rows
    out += (first + token)[:, None] * rows + row[None, :]
    tl.store(out, result, mask=has_token[:, None] & has_row[None, :])


@triton.jit
def _load_runs(x, at, column, has_token, has_k):
    """Returns x [tokens, k] of columns in runs: neighbours in memory are neighbours here."""
    inside = has_token[:, None] & has_k[None, :]
    return tl.load(x + (at[:, None] + column[None, :]), mask=inside, other=0.0)


@triton.jit
def _load_columns(x, at, column, x_feature, has_token, has_k):
    """Returns x [tokens, k] of columns that lie anywhere.

    With nothing else to go by, Triton runs threads along the first dimension; so x is read as
    [k, tokens], where neighbours in memory lie along the first.
    """
    inside = has_k[:, None] & has_token[None, :]
    offsets = at[None, :] + column[:, None].to(at.dtype) * x_feature
    return tl.trans(tl.load(x + offsets, mask=inside, other=0.0))


@triton.jit
def _assign_block(tokens, rows, S, BLOCK_TOKENS, BLOCK_ROWS, GROUP):
    """Returns the blocks of tokens and of rows of this program.

    GROUP blocks of tokens come for every block of rows, so that programs that run together share
    their reads.
    """
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    row_blocks = rows // S * tl.cdiv(S, BLOCK_ROWS)
    program = tl.program_id(0)
    first = program // (GROUP * row_blocks) * GROUP
    size = tl.minimum(token_blocks - first, GROUP)
    position = program % (GROUP * row_blocks)
    return first + position % size, position // size
