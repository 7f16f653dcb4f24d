"""Triton kernels that families share: activations, the end of products, and rounding to 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apply_activation(x, ACT: tl.constexpr):
    """Returns ACT(x). GELU's tanh form is x times a sigmoid: tanh(y) = 2 sigmoid(2 y) - 1."""
    if ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def finish_kernel(
    sums,
    x_scales,
    w_scales,
    bias,
    out,
    tokens,
    rows,
    SPLITS: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Computes out[t, r] = ACT(sum over s of sums[s, t, r] * x_scales[t] * w_scales[r] + bias[r]).

    Scales and bias are None or pointers. All is computed in float32 and rounded once.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_token, has_row = token < tokens, row < rows
    inside = has_token[:, None] & has_row[None, :]
    at = token[:, None] * rows + row[None, :]
    total = tl.load(sums + at, mask=inside, other=0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        part = sums + tl.full((), split, tl.int64) * tokens * rows
        total += tl.load(part + at, mask=inside, other=0).to(tl.float32)
    if x_scales is not None:
        scale = tl.load(x_scales + token, mask=has_token, other=0.0)[:, None]
        scale *= tl.load(w_scales + row, mask=has_row, other=0.0)[None, :]
        total *= scale
    if bias is not None:
        total += tl.load(bias + row, mask=has_row, other=0.0).to(tl.float32)[None, :]
    result = apply_activation(total, ACT).to(out.dtype.element_ty)
    tl.store(out + at, result, mask=inside)


@triton.jit
def quantize_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    out,
    factors,
    tokens,
    padded,
    cols,
    x_token,
    per_batch,
    epsilon,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    BY_BITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Rounds every row of y to 8 bits by a factor of its own: y[t] is about out[t] * factors[t].

    y is ACT(x), normalized as NORM says, times ``weight`` plus ``bias`` where there are any, times
    1 + ``scale`` plus ``shift`` of its batch where there are any. A row that is not finite gives
    zeros and a factor NaN; rows from ``tokens`` up to ``padded`` give zeros. BY_BITS computes the
    bytes of e4m3 where the conversion rounds wrongly: in Triton's interpreter.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_COLS)
    has_column = column < cols
    inside = (token < tokens)[:, None] & has_column[None, :]
    value = tl.load(x + token[:, None] * x_token + column[None, :], mask=inside, other=0.0)
    value = apply_activation(value.to(tl.float32), ACT)
    if NORM == "layer":
        value = tl.where(inside, value - (tl.sum(value, 1) / cols)[:, None], 0.0)
    if NORM != "none":
        value *= tl.rsqrt(tl.sum(value * value, 1) / cols + epsilon)[:, None]
    if weight is not None:
        value *= tl.load(weight + column, mask=has_column, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=has_column, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        batch = (token // per_batch)[:, None] * cols + column[None, :]
        value *= 1.0 + tl.load(scale + batch, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(shift + batch, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value, 0.0)
    size = tl.abs(value)
    is_finite = size < float("inf")
    most = tl.max(tl.where(is_finite, size, 0.0), 1)
    is_sound = tl.min(is_finite.to(tl.int32), 1) == 1
    factor = tl.maximum(most * (1.0 / LARGEST), 1.1754943508222875e-38)
    scaled = value * tl.math.div_rn(1.0, factor)[:, None]
    # Its largest is LARGEST but for rounding in float32, so that there is nothing to saturate.
    scaled = tl.where(is_sound[:, None], scaled, 0.0)
    if INTEGER:  # adds what leaves no bits for fractions: to the nearest, ties to even
        scaled = (scaled + 12582912.0) - 12582912.0
    elif BY_BITS:
        scaled = _encode_e4m3(scaled)
    at = token[:, None] * cols + column[None, :]
    written = token < padded
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=written[:, None] & has_column[None, :])
    tl.store(factors + token, tl.where(is_sound, factor, float("nan")), mask=written)


@triton.jit
def _encode_e4m3(x):
    """Returns the bytes of the nearest e4m3 numbers, ties to even; x: at most 448, in float32."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits &= 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # exponents begin 120 later
    small = ((tl.abs(x) + 24576.0) - 24576.0) * 512.0  # below 2^-6: multiples of 2^-9
    code = tl.where(bits < (121 << 23), small.to(tl.int32), normal)
    return (sign | code).to(tl.uint8)
