"""The search for a better order: exchanges between pairs of units, and escapes from local optima.

After Pool & Yu 2021 ("Channel Permutations for N:M Sparsity"), who exchange columns between stripes
of groups, and leave a local optimum by exchanges that cost. Here units are paired at random in
every round, all exchanges of a pair are evaluated at once, and the best of each pair is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .arrangement import Places, Unit, View, make_units, measure_units
from .row_exchange import is_per_row, measure_exchanges

CHUNK = 1 << 22
"""Scores that are looked at at a time."""
MOST_EXCHANGES = 64
"""Exchanges of a pair of units that are tried in a round; of more, so many drawn at random."""
LEAST_GAIN = 1e-9
"""The gain, as a share of a weight's energy, below which an exchange is not made."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How long to search.

    Attributes:
        rounds: The most rounds of a set of channels, each of which pairs its units anew.
        escapes: How often a local optimum is left by random exchanges.
        seed: Of the random choices.
    """

    rounds: int = 100
    escapes: int = 2
    seed: int = 0


@dataclass(slots=True)
class UnitGroup:
    """Units of equal sizes, side by side.

    Attributes:
        views: The weights that they lie in.
        lines: Of every view, [units, lines]: the indices that a unit covers, in the first order.
        at: Of every view, [units, slots * places]: where the slots of the places are among them.
        channels: [units, places]: the channels that are there now.
        energies: [units]: their kept energy, summed over the views.
    """

    views: Sequence[View]
    lines: list[Places]
    at: list[Places]
    channels: Places
    energies: NDArray[np.float64]

    @staticmethod
    def make(views: Sequence[View], units: Sequence[Unit]) -> UnitGroup:
        """Makes the group of units of equal sizes, in the first order."""
        lines = [np.stack([unit.lines[v] for unit in units]) for v in range(len(views))]
        at = [np.stack([unit.at[v].reshape(-1) for unit in units]) for v in range(len(views))]
        channels = np.stack([unit.places for unit in units])
        group = UnitGroup(views, lines, at, channels, np.zeros(len(units)))
        group.energies = group.measure(np.arange(len(units)), channels)
        return group

    def measure(self, numbers: Places, channels: Places) -> NDArray[np.float64]:
        """Returns the kept energy of units [k] with these channels [k, places]."""
        return sum(
            (self.measure_view(v, numbers, channels) for v in range(len(self.views))),
            np.zeros(len(numbers)),
        )

    def measure_view(self, v: int, numbers: Places, channels: Places) -> NDArray[np.float64]:
        """Returns the kept energy of units of one view."""
        view, lines = self.views[v], self.find_lines(v, numbers, channels)
        scores = view.weight.scores
        step = max(1, CHUNK // (scores.numel() // scores.shape[view.dim] * lines.shape[1]))
        wide = torch.from_numpy(lines).to(scores.device)
        parts = [measure_units(view, part) for part in torch.split(wide, step)]
        energies: NDArray[np.float64] = torch.cat(parts).cpu().numpy()
        return energies

    def find_lines(self, v: int, numbers: Places, channels: Places) -> Places:
        """Returns the indices that units [k] with channels [k, places] are put together from."""
        lines = self.lines[v][numbers]
        sources = self.views[v].indices[:, channels].transpose(1, 0, 2).reshape(len(numbers), -1)
        np.put_along_axis(lines, self.at[v][numbers], sources, 1)
        return lines

    def measure_exchanges(self, a: Places, b: Places, i: Places, j: Places) -> NDArray[np.float64]:
        """Returns the energies [2, pairs, exchanges] of units after exchanges of places i and j."""
        total = np.zeros((2, len(a), len(i)))
        others = []
        for v, view in enumerate(self.views):
            if is_per_row(view):
                lines = [self.find_lines(v, own, self.channels[own]) for own in (a, b)]
                at = self.at[v][a], self.at[v][b]
                total += measure_exchanges(view, (lines[0], lines[1]), at, (i, j))
            else:
                others.append(v)
        if others:
            both = np.concatenate(
                [part.reshape(-1, part.shape[2]) for part in self.swap(a, b, i, j)]
            )
            numbers = np.concatenate([np.repeat(a, len(i)), np.repeat(b, len(i))])
            for v in others:
                total += self.measure_view(v, numbers, both).reshape(total.shape)
        return total

    def swap(self, a: Places, b: Places, i: Places, j: Places) -> tuple[Places, Places]:
        """Returns the channels [pairs, exchanges, places] of units a and b after exchanges."""
        new_a = np.repeat(self.channels[a][:, None], len(i), 1)
        new_b = np.repeat(self.channels[b][:, None], len(i), 1)
        which = np.arange(len(i))
        new_a[:, which, i] = self.channels[b][:, j]
        new_b[:, which, j] = self.channels[a][:, i]
        return new_a, new_b

    def exchange_once(self, random: np.random.Generator) -> float:
        """Pairs the units and makes the best exchange of every pair; returns the energy gained."""
        pairs = random.permutation(len(self.energies))[: len(self.energies) // 2 * 2]
        a, b = pairs[::2], pairs[1::2]
        i, j = self.list_exchanges(random)
        energies = self.measure_exchanges(a, b, i, j)
        gains = energies.sum(0) - (self.energies[a] + self.energies[b])[:, None]
        best = gains.argmax(1)
        row = np.arange(len(a))
        better = gains[row, best] > LEAST_GAIN
        row, best = row[better], best[better]
        a, b, i, j = a[row], b[row], i[best], j[best]
        self.channels[a, i], self.channels[b, j] = self.channels[b, j], self.channels[a, i]
        self.energies[a], self.energies[b] = energies[:, row, best]
        return float(gains[row, best].sum())

    def list_exchanges(self, random: np.random.Generator) -> tuple[Places, Places]:
        """Returns the places (i of one unit, j of another) of the exchanges to try in a round."""
        size = self.channels.shape[1]
        numbers = np.arange(size * size)
        if len(numbers) > MOST_EXCHANGES:
            numbers = random.choice(numbers, MOST_EXCHANGES, replace=False)
        return numbers // size, numbers % size

    def shake(self, random: np.random.Generator) -> None:
        """Makes a few exchanges at random."""
        count = max(1, len(self.energies) // 8)
        pairs = random.permutation(len(self.energies))[: 2 * count]
        a, b = pairs[:count], pairs[count:]
        a = a[: len(b)]
        i, j = random.integers(self.channels.shape[1], size=(2, len(a)))
        old = self.channels[a, i].copy()
        self.channels[a, i], self.channels[b, j] = self.channels[b, j], old
        touched = np.concatenate([a, b])
        self.energies[touched] = self.measure(touched, self.channels[touched])


def search_order(
    views: Sequence[View], channels: int, options: SearchOptions, advance: Callable[[int], object]
) -> Places:
    """Searches an order of channels in which the weights keep more energy.

    Args:
        views: The weights that the channels lie in.
        channels: Their number.
        options: How long to search.
        advance: Called with the number of rounds done.

    Returns:
        Of every place, the channel to put there; never worse than the first order.
    """
    order = np.arange(channels)
    by_shape: dict[tuple[int, ...], list[Unit]] = {}
    for unit in make_units(views, channels):
        by_shape.setdefault(unit.shape, []).append(unit)
    random = np.random.default_rng((options.seed, channels))
    for units in by_shape.values():
        if len(units) > 1:
            group = UnitGroup.make(views, units)
            _climb(group, options.rounds, random, advance)
            for _ in range(options.escapes):
                before = group.channels.copy(), group.energies.copy()
                group.shake(random)
                _climb(group, options.rounds // 4, random, advance)
                if group.energies.sum() <= before[1].sum():
                    group.channels, group.energies = before
            order[np.stack([unit.places for unit in units])] = group.channels
    return order


def _climb(
    group: UnitGroup, rounds: int, random: np.random.Generator, advance: Callable[[int], object]
) -> None:
    """Makes rounds of exchanges; ends early where a quarter of them in a row gained nothing."""
    idle = 0
    for done in range(rounds):
        idle = 0 if group.exchange_once(random) > 0 else idle + 1
        advance(1)
        if idle > rounds // 4:
            advance(rounds - 1 - done)
            return
