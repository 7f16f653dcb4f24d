"""Selection: the n largest of every group of m weights, and exactly n of them.

No sorting: the m places of a group are m slices of the weight, and running maxima and minima over
whole slices (a selection network) give every group's n-th largest. A weight is cut into parts that
fit the cache.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from .sorting_network import SortingNetwork, build_selection_network

KEYS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
"""A magnitude's bits, read as an integer, order as the magnitude does: Inf above every number and
NaN above Inf, so even a broken weight keeps exactly n per group."""

_LITTLE_ENDIAN = sys.byteorder == "little"

_CACHE = 1 << 20
"""Bytes of magnitudes that a core is given at a time (measured: benchmarks/masks.py)."""

_LANES = 1 << 15
"""Elements a call should have: fewer, and the call costs more than its work."""

_BIG_GROUP, _BLOCK = 32, 8
"""Groups from this size up are read in blocks: one far stride would cost a cache line each."""

_SORT_FROM = 64
"""Maxima and minima from which an accelerator sorts instead: each is a kernel launch."""


def select_top_n(weight: Tensor, n: int, m: int, columns: Tensor | None = None) -> Tensor:
    """Returns the mask of the ``n`` largest magnitudes of every ``m`` along the input channels.

    weight: [out, in, *kernel]. columns: [out / V, in, *kernel], which V rows may choose from.
    """
    mask = torch.empty_like(weight, dtype=torch.bool)
    if n == m or weight.numel() == 0:
        return mask.fill_(True)
    scratch = _Scratch(KEYS[weight.dtype], weight.device)
    if weight.device.type != "cpu":
        _fill_at_once(weight, mask, columns, (n, m), scratch)
        return mask
    rows, marks = weight, mask
    if columns is None and _channels_last(weight) and _channels_last(mask):
        rows, marks = (x.movedim(1, -1).flatten(0, -2) for x in (weight, mask))
    shared = 1 if columns is None else len(weight) // len(columns)
    slots = _slots(m, columns)
    size = torch.get_num_threads() * max(_LANES * slots, _CACHE // weight.element_size())
    step = max(1, size * len(rows) // (rows.numel() * shared)) * shared
    parts = repeat(None) if columns is None else torch.split(columns, step // shared)
    for part, marked, chosen in zip(
        torch.split(rows, step), torch.split(marks, step), parts, strict=False
    ):
        _fill(part, marked, chosen, (n, m), scratch)
    return mask


def _grouped(tensor: Tensor, m: int) -> Tensor:
    """[out, in, ...] -> [m, out, in / m, ...], a view."""
    return torch.unflatten(tensor, 1, (-1, m)).movedim(2, 0)


class _Scratch:
    """Buffers to be written again: a fresh one costs more than the maximum written into it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._free: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)

    def take(self, shape: torch.Size) -> Tensor:
        free = self._free[shape]
        return free.pop() if free else torch.empty(shape, dtype=self.dtype, device=self.device)

    def give(self, *buffers: Tensor) -> None:
        for buffer in buffers:
            self._free[buffer.shape].append(buffer)


def _channels_last(tensor: Tensor) -> bool:
    return tensor.movedim(1, -1).is_contiguous()


def _slots(m: int, columns: Tensor | None) -> int:
    """Into how many slices the weight is taken apart: m, or a block's worth of a big group."""
    in_blocks = columns is None and m >= _BIG_GROUP and m % _BLOCK == 0
    return _BLOCK if in_blocks else m


def _fill(
    weight: Tensor, mask: Tensor, columns: Tensor | None, kept: tuple[int, int], scratch: _Scratch
) -> None:
    """Write the mask of a part of the rows that fits the cache."""
    n, m = kept
    slots = _slots(m, columns)
    keys = _keys(_grouped(weight, slots), columns, scratch)
    kth, runner_up = _edges(keys, n, m, scratch)
    edge = kth
    if slots < m:
        edge = kth.unsqueeze(2).expand(*kth.shape[:2], m // slots, *kth.shape[2:]).flatten(1, 2)
    _write(mask, keys, edge, scratch)
    level = torch.eq(kth, runner_up, out=scratch.take(kth.shape))
    if level.amax():
        tied = level.nonzero(as_tuple=True)
        groups = torch.unflatten(keys, 2, (-1, m // slots)).movedim((3, 0), (-2, -1))[tied]
        winners = _first_n(groups.flatten(1), kth[tied].unsqueeze(1), n, dim=1)
        _grouped(mask, m).movedim(0, -1)[tied] = winners
    scratch.give(keys, kth, runner_up, level)


def _keys(grouped: Tensor, columns: Tensor | None, scratch: _Scratch) -> Tensor:
    """The magnitudes as integers, one contiguous slice per place in the group; -1 where barred."""
    keys = scratch.take(grouped.shape)
    if grouped.element_size() > 2:
        torch.abs(grouped, out=keys.view(grouped.dtype))
    else:
        for key, place in zip(keys, grouped.view(keys.dtype), strict=True):
            key.copy_(place)
        keys.bitwise_and_(torch.iinfo(keys.dtype).max)
    if columns is not None:
        barred = _grouped(columns, len(keys)).to(keys.dtype).sub_(1)
        torch.unflatten(keys, 1, (len(columns), -1)).bitwise_or_(barred.unsqueeze(2))
    return keys


def _edges(keys: Tensor, n: int, m: int, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """The n-th and the next largest key of every group of m, found from the nearer end."""
    smallest, rank = m - n < n, min(n, m - n)
    slots, blocks = len(keys), m // len(keys)
    wires = list(keys)
    if blocks > 1:
        best = tuple(range(min(rank + 1, slots)))
        tops = _run(build_selection_network((1,) * slots, best), wires, smallest, scratch)
        split = [_deinterleave(top, blocks) for top in tops]
        wires = [top[block] for block in range(blocks) for top in split]
        scratch.give(*tops)
        network = build_selection_network((len(best),) * blocks, (rank - 1, rank))
    else:
        network = build_selection_network((1,) * slots, (rank - 1, rank))
    near, far = _run(network, wires, smallest, scratch)
    return (far, near) if smallest else (near, far)


def _run(
    network: SortingNetwork, inputs: Sequence[Tensor], smallest: bool, scratch: _Scratch
) -> list[Tensor]:
    """The outputs of the network, turned upside down for ``smallest``; the inputs stay."""
    high_of, low_of = torch.maximum, torch.minimum
    if smallest:
        high_of, low_of = low_of, high_of
    wires = dict(enumerate(inputs))
    for step in network.steps:
        a, b = wires.pop(step.a), wires.pop(step.b)
        if step.high is not None:
            wires[step.high] = high_of(a, b, out=scratch.take(a.shape))
        if step.low is not None:
            wires[step.low] = low_of(a, b, out=scratch.take(a.shape))
        scratch.give(*(x for wire, x in ((step.a, a), (step.b, b)) if wire >= len(inputs)))
    return [wires[output] for output in network.outputs]


def _deinterleave(lanes: Tensor, blocks: int) -> Tensor:
    """[out, in / slots, ...] -> [blocks, out, in / m, ...], contiguous."""
    view = _grouped(lanes, blocks)
    out = torch.empty(view.shape, dtype=lanes.dtype)
    for block, source in zip(out, view, strict=True):
        block.copy_(source)
    return out


def _write(mask: Tensor, keys: Tensor, edge: Tensor, scratch: _Scratch) -> None:
    """``mask = keys >= edge``, back in the order of the weight.

    Where the channels lie side by side, the booleans of neighbouring places are put together as
    the bytes of one integer and written at once.
    """
    width = keys.element_size()
    if mask.dim() != 2 or not mask.is_contiguous() or len(keys) % width or not _LITTLE_ENDIAN:
        for key, marks in zip(keys, _grouped(mask, len(keys)), strict=True):
            torch.ge(key, edge, out=marks)
        return
    flat = mask.view(-1).view(keys.dtype)  # a row of its own may have any stride
    words = _grouped(flat.view(len(mask), -1), len(keys) // width)
    above, packed = scratch.take(edge.shape), scratch.take(edge.shape)
    for places, word in zip(torch.split(keys, width), words, strict=True):
        torch.ge(places[-1], edge, out=packed)
        for place in range(width - 2, -1, -1):
            torch.ge(places[place], edge, out=above)
            torch.add(above, packed, alpha=256, out=packed if place else word)
    scratch.give(above, packed)


def _first_n(keys: Tensor, kth: Tensor, n: int, *, dim: int) -> Tensor:
    """True for the n largest along ``dim``, given the n-th; the first of equal ones win."""
    above, level = keys > kth, keys == kth
    room = n - above.sum(dim, keepdim=True, dtype=torch.int32)
    return above | (level & (level.cumsum(dim, dtype=torch.int32) <= room))


def _fill_at_once(
    weight: Tensor, mask: Tensor, columns: Tensor | None, kept: tuple[int, int], scratch: _Scratch
) -> None:
    """Write the whole mask without waiting for the device (an accelerator's way)."""
    n, m = kept
    keys = _keys(_grouped(weight, m), columns, scratch)
    if build_selection_network((1,) * m, (min(n, m - n) - 1, min(n, m - n))).cost < _SORT_FROM:
        kth, _ = _edges(keys, n, m, scratch)
    else:
        kth = keys.sort(dim=0, descending=True).values[n - 1]
    _grouped(mask, m).copy_(_first_n(keys, kth, n, dim=0))
