"""The kept energy of the weights that a coupled set lies in, unit by unit.

A unit is the smallest set of places whose channels a pattern decides on together, in all weights at
once: a group of 4 columns at 2:4, a band of rows of blocks. Its kept energy depends on its own
channels alone, so an exchange between two units changes those two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...patterns import Pattern

Places = NDArray[np.int64]


@dataclass(slots=True)
class ScoredWeight:
    """A weight to prune, as scores.

    Attributes:
        name: Its name.
        pattern: What it is to be pruned to.
        scores: [out, in, *kernel]; a mask keeps the largest, and its energy is the sum of their
            squares. In the order of the channels as permuted so far.
    """

    name: str
    pattern: Pattern
    scores: Tensor

    def measure(self) -> float:
        """Returns the share of the energy that the pattern keeps."""
        energy = self.scores.double().square()
        kept = energy * self.pattern.compute_mask(self.scores)
        return float(kept.sum() / energy.sum().clamp(min=1e-300))


@dataclass(frozen=True, slots=True)
class View:
    """A weight along the dimension in which a set's channels lie.

    Attributes:
        weight: The weight.
        dim: 1 for columns, 0 for rows.
        indices: [slots, channels]: the indices of the places.
        step: How many neighbours the pattern decides on together.
        scale: One over the weight's energy.
    """

    weight: ScoredWeight
    dim: int
    indices: Places
    step: int
    scale: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Places whose channels are decided on together.

    Attributes:
        places: Numbers of places of the set.
        lines: For every view, the indices of the weight's dimension that the unit covers: whole
            groups.
        at: For every view, where the slots of the places are among ``lines``: [slots, places].
    """

    places: Places
    lines: tuple[Places, ...]
    at: tuple[Places, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes: units of equal sizes are evaluated side by side."""
        return (len(self.places), *(len(lines) for lines in self.lines))


def make_view(weight: ScoredWeight, dim: int, indices: Places) -> View | None:
    """Returns the view of a weight; None where the order along the dimension changes no mask."""
    step = weight.pattern.width if dim == 1 else weight.pattern.height
    if step < 2 or weight.pattern.is_dense:
        return None
    energy = float(weight.scores.double().square().sum())
    return View(weight, dim, indices, step, 1.0 / energy if energy > 0 else 0.0)


def make_units(views: Sequence[View], channels: int) -> list[Unit]:
    """Returns the units of a set's places; those that cover one group are joined in all views."""
    root = np.arange(channels)
    changed = True
    while changed:
        before = root.copy()
        for view in views:
            groups = view.indices // view.step
            least = np.full(groups.max() + 1, channels)
            for own in groups:  # slots of different channels may share a group
                np.minimum.at(least, own, root)
            for own in groups:
                root = np.minimum(root, least[own])
        changed = not np.array_equal(root, before)
    return [_make_unit(views, np.flatnonzero(root == r)) for r in np.unique(root)]


def _make_unit(views: Sequence[View], places: Places) -> Unit:
    lines, at = [], []
    for view in views:
        own = view.indices[:, places]
        groups = np.unique(own // view.step)
        covered = (groups[:, None] * view.step + np.arange(view.step)).reshape(-1)
        lines.append(covered)
        at.append(np.searchsorted(covered, own))
    return Unit(places, tuple(lines), tuple(at))


def measure_units(view: View, lines: Tensor) -> Tensor:
    """Returns the kept energy of units of a view, as a share of the weight's energy.

    Args:
        view: The view.
        lines: [units, lines of a unit]: indices along the view's dimension, from which the units
            are put together.
    """
    count, width = lines.shape
    scores = view.weight.scores.index_select(view.dim, lines.reshape(-1))
    mask = view.weight.pattern.compute_mask(scores)
    kept = (scores * mask).square()
    by_line = kept.movedim(view.dim, 0).reshape(count, width, -1)
    return by_line.sum((1, 2), dtype=torch.float64) * view.scale
