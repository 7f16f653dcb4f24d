"""The Triton kernels of ``triton_mask``: mask and product of a tile of groups in one pass.

A *lane* is one group of M neighbours along the input channels, a *slot* each, of S rows that are
masked together (S = 1: every row on its own). A tile is [rows, lanes, slots], padded to powers of
two.
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
    weight_slot,
    out_slot,
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    SHARED: tl.constexpr,
    PER_ROW: tl.constexpr,
    FLOAT: tl.constexpr,
    INVERSE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes out = weight where kept (INVERSE: where pruned), else 0, as integers of their bits.

    The S rows of a lane choose ``SHARED`` columns of M by energy (0: all), then each row keeps N of
    those columns (PER_ROW). ``sizes``: sizes of the dimensions that lanes run through, fastest
    first. Strides of rows and lanes are in units of ALIGN elements, which tells the compiler how
    far a vector may reach.
    """
    lane = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * LANES + tl.arange(0, LANES)
    row = tl.arange(0, ROWS)[:, None, None]
    slot = tl.arange(0, SLOTS)[None, None, :]
    inside = (lane < lanes)[None, :, None]
    if ROWS != S:
        inside = inside & (row < S)
    if SLOTS != M:
        inside = inside & (slot < M)
    source = _compute_offsets(
        lane, row, slot, sizes, weight_lane, weight_row, weight_slot, ALIGN, WIDE
    )
    bits = tl.load(weight + source, mask=inside, other=0)
    allowed = slot < M
    if SHARED > 0:
        value = bits.to(FLOAT, bitcast=True).to(tl.float32)
        energy = tl.sum(value * value, axis=0, keep_dims=True).to(tl.int32, bitcast=True)
        allowed = _keep_largest(energy, slot, allowed, SHARED, M, SLOTS)
    if PER_ROW:
        allowed = _keep_largest(bits, slot, allowed, N, SHARED if SHARED > 0 else M, SLOTS)
    target = _compute_offsets(lane, row, slot, sizes, out_lane, out_row, out_slot, ALIGN, WIDE)
    tl.store(out + target, tl.where(allowed != INVERSE, bits, 0), mask=inside)


@triton.jit
def block_mask_kernel(
    weight,
    out,
    lanes,
    sizes,
    weight_lane,
    out_lane,
    weight_row,
    out_row,
    weight_slot,
    out_slot,
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    INNER_N: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    FLOAT: tl.constexpr,
    INVERSE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes as ``mask_kernel`` does, for lanes of M blocks of which the N of most energy are kept.

    A block is PARTS groups of SIZE slots. Each row keeps INNER_N of a group, and the energy of a
    block is counted over those. BLOCKS, GROUPS, SLOTS: M, PARTS and SIZE as powers of two.
    """
    BLOCK: tl.constexpr = GROUPS * SLOTS
    lane = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * LANES + tl.arange(0, LANES)
    row = tl.arange(0, ROWS)[:, None, None]
    slot = tl.arange(0, BLOCKS * BLOCK)[None, None, :]
    inside = (lane < lanes)[None, :, None] & (row < S)
    if BLOCKS * BLOCK != M * PARTS * SIZE:  # else slots lie side by side, as the compiler must see
        block, part, index = slot // BLOCK, slot % BLOCK // SLOTS, slot % SLOTS
        slot = (block * PARTS + part) * SIZE + index
        inside = inside & (block < M) & (part < PARTS) & (index < SIZE)
    source = _compute_offsets(
        lane, row, slot, sizes, weight_lane, weight_row, weight_slot, ALIGN, WIDE
    )
    bits = tl.load(weight + source, mask=inside, other=0)
    allowed, value = inside, bits.to(FLOAT, bitcast=True).to(tl.float32)
    if INNER_N != SIZE:
        groups = tl.reshape(bits, (ROWS, LANES * BLOCKS * GROUPS, SLOTS))
        index = tl.arange(0, SLOTS)[None, None, :]
        kept = _keep_largest(groups, index, index < SIZE, INNER_N, SIZE, SLOTS)
        allowed = allowed & tl.reshape(kept, (ROWS, LANES, BLOCKS * BLOCK))
        value = tl.where(allowed, value, 0.0)
    energy = tl.reshape(tl.sum(value * value, axis=0), (LANES * BLOCKS, BLOCK))
    energy = tl.reshape(tl.sum(energy, axis=1), (1, LANES, BLOCKS)).to(tl.int32, bitcast=True)
    number = tl.arange(0, BLOCKS)[None, None, :]
    chosen = _keep_largest(energy, number, number < M, N, M, BLOCKS)
    chosen = tl.reshape(tl.broadcast_to(chosen, (1, LANES, BLOCKS)), (LANES * BLOCKS, 1))
    chosen = tl.broadcast_to(chosen, (LANES * BLOCKS, BLOCK))
    allowed = allowed & tl.reshape(chosen, (1, LANES, BLOCKS * BLOCK))
    target = _compute_offsets(lane, row, slot, sizes, out_lane, out_row, out_slot, ALIGN, WIDE)
    tl.store(out + target, tl.where(allowed != INVERSE, bits, 0), mask=inside)


@triton.jit
def _compute_offsets(lane, row, slot, sizes, lane_strides, row_stride, slot_stride, ALIGN, WIDE):
    """Returns the offsets [rows, lanes, slots] of elements, in elements."""
    at = tl.zeros_like(lane)
    for d in tl.static_range(len(sizes)):
        at += lane % sizes[d] * lane_strides[d]
        lane = lane // sizes[d]
    at += lane * lane_strides[len(sizes)]
    if WIDE:
        row, slot = row.to(tl.int64), slot.to(tl.int64)
    return (row * row_stride + at[None, :, None]) * ALIGN + slot * slot_stride


@triton.jit
def _keep_largest(bits, slot, allowed, N: tl.constexpr, OF: tl.constexpr, SLOTS: tl.constexpr):
    """Returns True for the N largest magnitudes of every group, in which OF slots are allowed.

    The slot makes every key distinct, and the first of equal magnitudes the largest. Where most
    are kept, the few smallest are selected instead.
    """
    BITS: tl.constexpr = bits.dtype.primitive_bitwidth - 1
    magnitude = bits & ((1 << BITS) - 1)
    keys = magnitude.to(tl.int64 if BITS > 16 else tl.int32) * SLOTS + (SLOTS - 1 - slot)
    if N == OF:
        kept = allowed
    elif 2 * N <= OF:
        kept = _select_largest(tl.where(allowed, keys, -1), N, BITS, SLOTS)
    else:
        keys = ((1 << BITS) * SLOTS - 1) - keys
        pruned = _select_largest(tl.where(allowed, keys, -1), OF - N, BITS, SLOTS)
        kept = allowed & ~pruned
    return kept


@triton.jit
def _select_largest(keys, COUNT: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr):
    """Returns True for the COUNT largest of distinct keys >= 0 along the last axis.

    One maximum below the last per round, or the edge bit by bit: nothing of M x M is formed, and
    no key changes its thread.
    """
    edge = tl.max(keys, axis=2, keep_dims=True)
    if 3 * COUNT <= 2 * BITS:
        for _ in range(COUNT - 1):
            edge = tl.max(tl.where(keys < edge, keys, -1), axis=2, keep_dims=True)
    else:
        edge = tl.zeros_like(edge)
        bit = (1 << (BITS - 1)) * SLOTS
        while bit > 0:
            above = tl.sum((keys >= edge + bit).to(tl.int32), axis=2, keep_dims=True)
            edge = tl.where(above >= COUNT, edge + bit, edge)
            bit = bit >> 1
    return keys >= edge
