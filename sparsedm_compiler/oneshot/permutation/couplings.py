"""ChannelLog -> CoupledSet: the channels that may change places, with all they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .channel_log import Atoms, Axis, ChannelLog, Hashes, hash_text, mix


@dataclass(frozen=True, slots=True)
class CoupledAxis:
    """The indices of one axis that belong to channels.

    Attributes:
        parameter: The name of the parameter or buffer.
        dim: The dimension; None for the elements in order.
        indices: [slots, channels]: a channel may have several indices of one axis, in order.
    """

    parameter: str
    dim: int | None
    indices: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CoupledSet:
    """Channels of which any may change places with any other, wherever they occur at once.

    Attributes:
        channels: Their number, at least 2.
        axes: All that is permuted together.
    """

    channels: int
    axes: tuple[CoupledAxis, ...]

    def list_parameters(self, dim: int) -> list[str]:
        """Returns the matrices whose rows (``dim`` 0) or columns (1) the channels are."""
        return [axis.parameter for axis in self.axes if axis.dim == dim]


@dataclass(frozen=True, slots=True)
class Couplings:
    """All sets of a graph, and why other channels stay.

    Attributes:
        sets: The sets, in the order of the graph.
        reasons: By (parameter, dim) the phrases why channels of that axis stay, without doubles.
    """

    sets: tuple[CoupledSet, ...]
    reasons: dict[tuple[str, int | None], tuple[str, ...]]


def find_couplings(log: ChannelLog) -> Couplings:
    """Finds the largest sets of channels that the graph treats alike.

    Two channels are alike where their atoms, in order, lie on the same axes, take part in the
    same ops in the same way, and meet each other in the same pairs.
    """
    channels = log.find_channels()
    pinned = log.find_pinned(channels)
    owners = np.zeros(len(channels), np.int64)
    for k, axis in enumerate(log.axes):
        owners[axis.first : axis.first + axis.size] = k
    order = np.argsort(channels, kind="stable")[1:]  # atom 0 is none
    grouped = channels[order]
    starts = np.flatnonzero(np.concatenate([[True], grouped[1:] != grouped[:-1]]))
    ranks = np.arange(len(grouped)) - np.repeat(starts, np.diff([*starts, len(grouped)]))
    hashed = mix(log.signatures[order] + mix(owners[order].astype(np.uint64)))
    hashed = mix(hashed + mix(ranks.astype(np.uint64) + hash_text("rank")))
    totals = (
        np.add.reduceat(hashed, starts) + _hash_pairs(log, channels, order, ranks)[grouped[starts]]
    )
    members: dict[tuple[int, int], list[Atoms]] = {}
    ends = [*starts[1:], len(grouped)]
    for start, end, total in zip(starts, ends, totals, strict=True):
        if int(grouped[start]) not in pinned:
            key = int(total), int(end - start)
            members.setdefault(key, []).append(order[start:end])
    sets = [_make_set(np.stack(atoms, 1), owners, log.axes) for atoms in members.values()]
    return Couplings(
        tuple(one for one in sets if one is not None), _list_reasons(log, channels, pinned)
    )


def _hash_pairs(log: ChannelLog, channels: Atoms, order: Atoms, ranks: Atoms) -> Hashes:
    """Returns, at the number of a channel, a hash of which of its atoms meet in which op."""
    rank_of = np.zeros(len(channels), np.uint64)
    rank_of[order] = ranks.astype(np.uint64)
    totals = np.zeros(len(channels), np.uint64)
    for number, (first, second) in enumerate(log.edges):
        met = mix(mix(rank_of[first]) + rank_of[second]) + hash_text(f"pair {number}")
        np.add.at(totals, channels[first], mix(met))
    return totals


def _make_set(atoms: Atoms, owners: Atoms, axes: Sequence[Axis]) -> CoupledSet | None:
    """Returns the set of channels [atoms of a channel, channels]; None for fewer than two."""
    own = owners[atoms]
    if atoms.shape[1] < 2 or not bool((own == own[:, :1]).all()):
        return None
    coupled = []
    for k in dict.fromkeys(int(axis) for axis in own[:, 0]):
        indices = atoms[own[:, 0] == k] - axes[k].first
        coupled.append(CoupledAxis(axes[k].parameter, axes[k].dim, indices))
    return CoupledSet(atoms.shape[1], tuple(coupled))


def _list_reasons(
    log: ChannelLog, channels: Atoms, pinned: dict[int, str]
) -> dict[tuple[str, int | None], tuple[str, ...]]:
    reasons: dict[tuple[str, int | None], tuple[str, ...]] = {}
    for axis in log.axes:
        own = np.unique(channels[axis.first : axis.first + axis.size])
        phrases = dict.fromkeys(pinned[int(c)] for c in own if int(c) in pinned)
        reasons[axis.parameter, axis.dim] = tuple(phrases)
    return reasons
