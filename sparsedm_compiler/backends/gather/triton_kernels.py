"""The Triton kernel of the gather ops: products over the columns that a block of rows keeps."""

from __future__ import annotations

import triton
import triton.language as tl


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
    ACT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Computes a tile of out, the activated sums of products over gathered columns.

    out[t, r] = ACT(sum over k of x[t, columns[r / S, k]] * values[r / S, k, r % S] + bias[r]).

    A program computes BLOCK_TOKENS tokens of BLOCK_ROWS rows that share their columns; ``bias`` is
    None or a pointer; EVEN says that ``kept`` is a multiple of BLOCK_K. Sums, bias and activation
    are in float32, rounded once.
    """
    token_block, row_block = _assign_block(tokens, rows, S, BLOCK_TOKENS, BLOCK_ROWS, GROUP)
    parts: tl.constexpr = (S + BLOCK_ROWS - 1) // BLOCK_ROWS
    share = (row_block // parts).to(tl.int64)
    within = row_block % parts * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = token_block.to(tl.int64) * BLOCK_TOKENS
    token = tl.arange(0, BLOCK_TOKENS)
    k = tl.arange(0, BLOCK_K)
    columns += share * kept + k
    values += share * kept * S + k[:, None] * S + within[None, :]
    x += first * x_token
    at = (token.to(tl.int64 if WIDE else tl.int32) * x_token)[None, :]
    has_token, has_row = token < tokens - first, (within < S)[None, :]
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), dtype=tl.float32)
    for start in range(0, kept, BLOCK_K):
        has_k = k < kept - start
        if EVEN:
            has_k = k < BLOCK_K
        column = tl.load(columns, mask=has_k, other=0)[:, None].to(at.dtype)
        # [k, tokens]: with nothing else to go by, Triton runs threads along the first dimension,
        # and there lie the neighbours in memory.
        inside = has_k[:, None] & has_token[None, :]
        picked = tl.load(x + (at + column * x_feature), mask=inside, other=0.0)
        value = tl.load(values, mask=has_k[:, None] & has_row, other=0.0)
        if UPCAST:  # Triton's interpreter would multiply bfloat16 as integers
            picked, value = picked.to(tl.float32), value.to(tl.float32)
        sums = tl.dot(tl.trans(picked), value, sums, input_precision="ieee")
        columns += BLOCK_K
        values += BLOCK_K * S
    row = share * S + within
    if bias is not None:
        sums += tl.load(bias + row, mask=within < S, other=0.0).to(tl.float32)[None, :]
    result = _apply_activation(sums, ACT).to(out.dtype.element_ty)
    out += (first + token)[:, None] * rows + row[None, :]
    tl.store(out, result, mask=has_token[:, None] & has_row)


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


@triton.jit
def _apply_activation(x, ACT: tl.constexpr):
    """Returns ACT(x). GELU's tanh form is x times a sigmoid: tanh(y) = 2 sigmoid(2 y) - 1."""
    if ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "silu":
        x = x * tl.sigmoid(x)
    return x
