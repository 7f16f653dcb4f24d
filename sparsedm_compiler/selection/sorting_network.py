"""Selection networks: the n-th largest of m numbers by few running maxima and minima."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count

Wires = list[int]
Swap = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Step:
    """``high = max(a, b)`` and ``low = min(a, b)``; None for a result that no later step reads."""

    a: int
    b: int
    high: int | None
    low: int | None


@dataclass(frozen=True, slots=True)
class SortingNetwork:
    """Steps that compute the wires ``outputs`` from the input wires 0..k-1.

    Every wire is written once and read at most once, so a step uses up its ``a`` and ``b``.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    @property
    def cost(self) -> int:
        """The number of maxima and minima that the network computes."""
        return sum((step.high is not None) + (step.low is not None) for step in self.steps)


@cache
def build_selection_network(sizes: tuple[int, ...], ranks: tuple[int, ...]) -> SortingNetwork:
    """Returns a network that selects numbers by rank from sorted lists.

    Lists are merged in pairs (odd-even merge, Batcher 1968) and cut to the ranks that can still
    matter; then every result that leads to no output is dropped.

    Args:
        sizes: Lengths of the lists. They lie one behind the other on the input wires, each with
            its largest number first; an unsorted wire is a list of one.
        ranks: Ranks to select among the numbers of all lists; 0 is the largest number.

    Returns:
        The network, whose ``outputs`` are in the order of ``ranks``.

    Example:
        >>> build_selection_network((1, 1, 1, 1), (1, 2)).cost
        8
    """
    swaps: list[Swap] = []
    wires = count()
    lists = [[next(wires) for _ in range(size)] for size in sizes]
    best = _merge_lists(lists, max(ranks) + 1, swaps, wires)
    outputs = tuple(best[rank] for rank in ranks)
    return SortingNetwork(_drop_unread(swaps, outputs), outputs)


def _merge_lists(lists: list[Wires], top: int, swaps: list[Swap], wires: Iterator[int]) -> Wires:
    """Merges the lists into one and returns its ``top`` first wires.

    One half is done before the other is begun: few wires are in use at a time, and stay cached.
    """
    if len(lists) == 1:
        return lists[0]
    half = (len(lists) + 1) // 2
    a, b = (_merge_lists(part, top, swaps, wires) for part in (lists[:half], lists[half:]))
    return _merge(a, b, swaps, wires)[:top]


def _merge(a: Wires, b: Wires, swaps: list[Swap], wires: Iterator[int]) -> Wires:
    """Merges the wires of two sorted lists into one sorted list and appends the swaps it takes."""
    if not a or not b:
        return a or b
    if len(a) == len(b) == 1:
        swaps.append((a[0], b[0], next(wires), next(wires)))
        return list(swaps[-1][2:])
    even = _merge(a[::2], b[::2], swaps, wires)
    odd = _merge(a[1::2], b[1::2], swaps, wires)
    out = [even[0]]
    for high, low in zip(odd, even[1:], strict=False):
        out += _merge([high], [low], swaps, wires)
    shared = min(len(odd), len(even) - 1)
    return out + odd[shared:] + even[1 + shared :]


def _drop_unread(swaps: list[Swap], outputs: tuple[int, ...]) -> tuple[Step, ...]:
    """Returns the steps that lead to the outputs."""
    read = set(outputs)
    steps = []
    for a, b, high, low in reversed(swaps):
        if high in read or low in read:
            steps.append(Step(a, b, high if high in read else None, low if low in read else None))
            read.update((a, b))
    return tuple(reversed(steps))
