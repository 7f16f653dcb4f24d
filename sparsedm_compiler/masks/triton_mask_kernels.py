"""The Triton kernel of ``masking``: mask and product of a tile of groups in one pass.

A *lane* is one group of M neighbours along the input channels of S rows that are masked together
(S = 1: a row of its own). A tile is [rows, lanes, places], padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mask_kernel(
    weight,
    out,
    lanes,
    sizes,
    weight_lane,
    out_lane,
    weight_row,
    out_row,
    weight_place,
    out_place,
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    SHARED: tl.constexpr,
    FREE: tl.constexpr,
    FLOAT: tl.constexpr,
    REST: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = weight where kept (REST: where not), else 0, both read as integers of their bits.

    The S rows of a lane choose ``SHARED`` columns of M by energy (0: none), then each row keeps N
    of those of M or SHARED that are left to it (FREE). ``sizes``: of the dimensions that lanes run
    through, fastest first. Strides of rows and lanes are in units of ALIGN elements, which tells
    the compiler how far a vector may reach.
    """
    lane = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * LANES + tl.arange(0, LANES)
    row = tl.arange(0, ROWS)[:, None, None]
    place = tl.arange(0, PLACES)[None, None, :]
    inside = (lane < lanes)[None, :, None]
    if ROWS != S:
        inside = inside & (row < S)
    if PLACES != M:
        inside = inside & (place < M)
    source = _at(lane, row, place, sizes, weight_lane, weight_row, weight_place, ALIGN, WIDE)
    bits = tl.load(weight + source, mask=inside, other=0)
    allowed = place < M
    if SHARED > 0:
        value = bits.to(FLOAT, bitcast=True).to(tl.float32)
        energy = tl.sum(value * value, axis=0, keep_dims=True).to(tl.int32, bitcast=True)
        allowed = _kept(energy, place, allowed, SHARED, M, PLACES)
    if FREE:
        allowed = _kept(bits, place, allowed, N, SHARED if SHARED > 0 else M, PLACES)
    target = _at(lane, row, place, sizes, out_lane, out_row, out_place, ALIGN, WIDE)
    tl.store(out + target, tl.where(allowed != REST, bits, 0), mask=inside)


@triton.jit
def _at(lane, row, place, sizes, lane_strides, row_stride, place_stride, ALIGN, WIDE):
    """[rows, lanes, places]: where elements lie, in elements."""
    at = tl.zeros_like(lane)
    for d in tl.static_range(len(sizes)):
        at += lane % sizes[d] * lane_strides[d]
        lane = lane // sizes[d]
    at += lane * lane_strides[len(sizes)]
    if WIDE:
        row, place = row.to(tl.int64), place.to(tl.int64)
    return (row * row_stride + at[None, :, None]) * ALIGN + place * place_stride


@triton.jit
def _kept(bits, place, allowed, N: tl.constexpr, OF: tl.constexpr, PLACES: tl.constexpr):
    """True for the N largest magnitudes of every group, of which OF places are allowed.

    The place makes every key another, and the first of equal magnitudes the largest. Where most
    are kept, the few smallest are looked for instead.
    """
    BITS: tl.constexpr = bits.dtype.primitive_bitwidth - 1
    magnitude = bits & ((1 << BITS) - 1)
    keys = magnitude.to(tl.int64 if BITS > 16 else tl.int32) * PLACES + (PLACES - 1 - place)
    if N == OF:
        kept = allowed
    elif 2 * N <= OF:
        kept = _largest(tl.where(allowed, keys, -1), N, BITS, PLACES)
    else:
        keys = ((1 << BITS) * PLACES - 1) - keys
        pruned = _largest(tl.where(allowed, keys, -1), OF - N, BITS, PLACES)
        kept = allowed & ~pruned
    return kept


@triton.jit
def _largest(keys, COUNT: tl.constexpr, BITS: tl.constexpr, PLACES: tl.constexpr):
    """True for the COUNT largest of keys >= 0, no two of them equal, along the last axis.

    One maximum below the last per round, or the edge bit by bit: nothing of M x M is formed, and
    no key changes its thread.
    """
    edge = tl.max(keys, axis=2, keep_dims=True)
    if 3 * COUNT <= 2 * BITS:
        for _ in range(COUNT - 1):
            edge = tl.max(tl.where(keys < edge, keys, -1), axis=2, keep_dims=True)
    else:
        edge = tl.zeros_like(edge)
        bit = (1 << (BITS - 1)) * PLACES
        while bit > 0:
            above = tl.sum((keys >= edge + bit).to(tl.int32), axis=2, keep_dims=True)
            edge = tl.where(above >= COUNT, edge + bit, edge)
            bit = bit >> 1
    return keys >= edge
