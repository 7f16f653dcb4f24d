"""Masks that keep exactly the n largest magnitudes of every group of m weights.

Nothing is sorted: the m slots of a group are m slices of the weight, and running maxima and minima
over whole slices (a selection network) give every group's n-th largest. A weight is cut into parts
that fit the cache.
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
"""The integer type that reads the bits of a float type.

The bits of a magnitude, read as an integer, order as the magnitude does, with Inf above every
number and NaN above Inf, so even a broken weight keeps exactly n per group.
"""

_LITTLE_ENDIAN = sys.byteorder == "little"

_PART_BYTES = 1 << 20
"""Bytes of magnitudes that each core works on at a time (measured: benchmarks/masks.py)."""

_CALL_ELEMENTS = 1 << 15
"""Elements that a tensor op should have; with fewer, the call costs more than its work."""

_BIG_GROUP, _BLOCK = 32, 8
"""Groups from the first size up are read in blocks of the second.

Slices with one wide stride would cost a cache line per weight.
"""

_SORT_FROM_COST = 64
"""Maxima and minima from which an accelerator sorts instead, since each is a kernel launch."""


def select_top_n(weight: Tensor, n: int, m: int, columns: Tensor | None = None) -> Tensor:
    """Returns the mask of the ``n`` largest magnitudes of every ``m`` along the input channels.

    Of equal magnitudes the lowest index wins. NaN counts as the largest, then Inf.

    Args:
        weight: [out, in, *kernel], detached, in a dtype of ``KEYS``; ``m`` divides ``in``.
        n: Weights to keep of every group.
        m: Consecutive input channels of a group.
        columns: bool [out / V, in, *kernel]: True for the input channels that V consecutive rows
            may keep, at least ``n`` of every group. None: all of them.

    Returns:
        A bool tensor of the shape of ``weight``, True where a weight is kept.

    Example:
        >>> select_top_n(torch.tensor([[3.0, -4.0, 1.0, 3.0]]), 2, 4)
        tensor([[ True,  True, False, False]])
    """
    mask = torch.empty_like(weight, dtype=torch.bool)
    if n == m or weight.numel() == 0:
        return mask.fill_(True)
    scratch = _Scratch(KEYS[weight.dtype], weight.device)
    if weight.device.type != "cpu":
        _fill_mask_at_once(weight, mask, columns, (n, m), scratch)
        return mask
    rows, marks = weight, mask
    if columns is None and _is_channels_last(weight) and _is_channels_last(mask):
        rows, marks = (x.movedim(1, -1).flatten(0, -2) for x in (weight, mask))
    shared = 1 if columns is None else len(weight) // len(columns)
    slots = _count_slots(m, columns)
    size = torch.get_num_threads() * max(
        _CALL_ELEMENTS * slots, _PART_BYTES // weight.element_size()
    )
    step = max(1, size * len(rows) // (rows.numel() * shared)) * shared
    parts = repeat(None) if columns is None else torch.split(columns, step // shared)
    for part, marked, chosen in zip(
        torch.split(rows, step), torch.split(marks, step), parts, strict=False
    ):
        _fill_mask(part, marked, chosen, (n, m), scratch)
    return mask


def _split_groups(tensor: Tensor, m: int) -> Tensor:
    """Views [out, in, ...] as [m, out, in / m, ...]."""
    return torch.unflatten(tensor, 1, (-1, m)).movedim(2, 0)


class _Scratch:
    """A pool of buffers, because a fresh one costs more than the maximum written into it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._unused: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)

    def take(self, shape: torch.Size) -> Tensor:
        """Returns a buffer of that shape, with any contents."""
        unused = self._unused[shape]
        return unused.pop() if unused else torch.empty(shape, dtype=self.dtype, device=self.device)

    def put_back(self, *buffers: Tensor) -> None:
        """Lets ``take`` return the buffers again."""
        for buffer in buffers:
            self._unused[buffer.shape].append(buffer)


def _is_channels_last(tensor: Tensor) -> bool:
    """Returns whether the input channels lie side by side in memory, rows outermost."""
    return tensor.movedim(1, -1).is_contiguous()


def _count_slots(m: int, columns: Tensor | None) -> int:
    """Returns the number of slices that a weight is split into: m, or one block of a big group."""
    in_blocks = columns is None and m >= _BIG_GROUP and m % _BLOCK == 0
    return _BLOCK if in_blocks else m


def _fill_mask(
    weight: Tensor, mask: Tensor, columns: Tensor | None, kept: tuple[int, int], scratch: _Scratch
) -> None:
    """Writes the mask of a part of the rows that fits the cache."""
    n, m = kept
    slots = _count_slots(m, columns)
    keys = _compute_keys(_split_groups(weight, slots), columns, scratch)
    kth, runner_up = _find_edges(keys, n, m, scratch)
    edge = kth
    if slots < m:
        edge = kth.unsqueeze(2).expand(*kth.shape[:2], m // slots, *kth.shape[2:]).flatten(1, 2)
    _write_mask(mask, keys, edge, scratch)
    level = torch.eq(kth, runner_up, out=scratch.take(kth.shape))
    if level.amax():
        tied = level.nonzero(as_tuple=True)
        groups = torch.unflatten(keys, 2, (-1, m // slots)).movedim((3, 0), (-2, -1))[tied]
        winners = _pick_first_n(groups.flatten(1), kth[tied].unsqueeze(1), n, dim=1)
        _split_groups(mask, m).movedim(0, -1)[tied] = winners
    scratch.put_back(keys, kth, runner_up, level)


def _compute_keys(grouped: Tensor, columns: Tensor | None, scratch: _Scratch) -> Tensor:
    """Returns the magnitudes as integers, one contiguous slice per slot of the group.

    -1 stands where ``columns`` is False.
    """
    keys = scratch.take(grouped.shape)
    if grouped.element_size() > 2:
        torch.abs(grouped, out=keys.view(grouped.dtype))
    else:
        for key, slot in zip(keys, grouped.view(keys.dtype), strict=True):
            key.copy_(slot)
        keys.bitwise_and_(torch.iinfo(keys.dtype).max)
    if columns is not None:
        barred = _split_groups(columns, len(keys)).to(keys.dtype).sub_(1)
        torch.unflatten(keys, 1, (len(columns), -1)).bitwise_or_(barred.unsqueeze(2))
    return keys


def _find_edges(keys: Tensor, n: int, m: int, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Returns the n-th and the next largest key of every group of m, from the nearer end."""
    smallest, rank = m - n < n, min(n, m - n)
    slots, blocks = len(keys), m // len(keys)
    wires = list(keys)
    if blocks > 1:
        best = tuple(range(min(rank + 1, slots)))
        tops = _run_network(build_selection_network((1,) * slots, best), wires, smallest, scratch)
        split = [_deinterleave(top, blocks) for top in tops]
        wires = [top[block] for block in range(blocks) for top in split]
        scratch.put_back(*tops)
        network = build_selection_network((len(best),) * blocks, (rank - 1, rank))
    else:
        network = build_selection_network((1,) * slots, (rank - 1, rank))
    near, far = _run_network(network, wires, smallest, scratch)
    return (far, near) if smallest else (near, far)


def _run_network(
    network: SortingNetwork, inputs: Sequence[Tensor], smallest: bool, scratch: _Scratch
) -> list[Tensor]:
    """Returns the outputs of the network and leaves the inputs as they are.

    ``smallest`` swaps maxima and minima, so that rank 0 is the smallest number.
    """
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
        scratch.put_back(*(x for wire, x in ((step.a, a), (step.b, b)) if wire >= len(inputs)))
    return [wires[output] for output in network.outputs]


def _deinterleave(lanes: Tensor, blocks: int) -> Tensor:
    """Copies [out, in / slots, ...] to [blocks, out, in / m, ...], contiguous."""
    view = _split_groups(lanes, blocks)
    out = torch.empty(view.shape, dtype=lanes.dtype, device=lanes.device)
    for block, source in zip(out, view, strict=True):
        block.copy_(source)
    return out


def _write_mask(mask: Tensor, keys: Tensor, edge: Tensor, scratch: _Scratch) -> None:
    """Writes ``mask = keys >= edge`` in the order of the weight.

    Where the channels lie side by side, the booleans of neighbouring slots are put together as the
    bytes of one integer and written at once.
    """
    width = keys.element_size()
    if mask.dim() != 2 or not mask.is_contiguous() or len(keys) % width or not _LITTLE_ENDIAN:
        for key, marks in zip(keys, _split_groups(mask, len(keys)), strict=True):
            torch.ge(key, edge, out=marks)
        return
    flat = mask.view(-1).view(keys.dtype)  # a row of its own may have any stride
    words = _split_groups(flat.view(len(mask), -1), len(keys) // width)
    above, packed = scratch.take(edge.shape), scratch.take(edge.shape)
    for slots, word in zip(torch.split(keys, width), words, strict=True):
        torch.ge(slots[-1], edge, out=packed)
        for byte in range(width - 2, -1, -1):
            torch.ge(slots[byte], edge, out=above)
            torch.add(above, packed, alpha=256, out=packed if byte else word)
    scratch.put_back(above, packed)


def _pick_first_n(keys: Tensor, kth: Tensor, n: int, *, dim: int) -> Tensor:
    """Returns True for the n largest along ``dim``; the first of equal keys win.

    ``kth`` is the n-th largest key.
    """
    above, level = keys > kth, keys == kth
    room = n - above.sum(dim, keepdim=True, dtype=torch.int32)
    return above | (level & (level.cumsum(dim, dtype=torch.int32) <= room))


def _fill_mask_at_once(
    weight: Tensor, mask: Tensor, columns: Tensor | None, kept: tuple[int, int], scratch: _Scratch
) -> None:
    """Writes the whole mask without waiting for the device, as an accelerator wants it."""
    n, m = kept
    keys = _compute_keys(_split_groups(weight, m), columns, scratch)
    if build_selection_network((1,) * m, (min(n, m - n) - 1, min(n, m - n))).cost < _SORT_FROM_COST:
        kth, _ = _find_edges(keys, n, m, scratch)
    else:
        kth = keys.sort(dim=0, descending=True).values[n - 1]
    _split_groups(mask, m).copy_(_pick_first_n(keys, kth, n, dim=0))
