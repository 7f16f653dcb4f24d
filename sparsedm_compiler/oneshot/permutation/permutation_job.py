"""One run of permutation: the sets that matter to a pattern, and the orders that were written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ...progress import ProgressBar
from .apply_order import apply_order, invert_order
from .arrangement import Places, ScoredWeight, View, make_units, make_view
from .couplings import CoupledSet, Couplings
from .permutation_report import PermutedChannels, WeightEnergy
from .search import SearchOptions, search_order


@dataclass(slots=True)
class PermutationJob:
    """One run.

    Attributes:
        couplings: What may be permuted.
        scored: The weights to prune, by name.
        tensors: All parameters and buffers of the model, by name.
        options: How long to search.
        applied: What was written so far, to be undone where something fails.
    """

    couplings: Couplings
    scored: Mapping[str, ScoredWeight]
    tensors: Mapping[str, Tensor]
    options: SearchOptions
    applied: list[tuple[CoupledSet, Places]] = field(default_factory=list)

    def group_sets(self) -> list[list[CoupledSet]]:
        """Returns the sets that a pattern depends on; those of the same weights together."""
        groups: dict[tuple[tuple[str, int | None], ...], list[CoupledSet]] = {}
        for one in self.couplings.sets:
            views = self.list_views(one)
            if views and len(make_units(views, one.channels)) > 1:
                key = tuple((axis.parameter, axis.dim) for axis in one.axes)
                groups.setdefault(key, []).append(one)
        return list(groups.values())

    def list_views(self, coupled: CoupledSet) -> list[View]:
        """Returns the weights to prune that a set lies in, where its order changes their masks.

        Rows of a weight whose columns are in the set too are left out: both at once would not be
        independent from unit to unit.
        """
        columns = coupled.list_parameters(1)
        views = []
        for axis in coupled.axes:
            weight = self.scored.get(axis.parameter)
            if weight is None or axis.dim is None or (axis.dim == 0 and axis.parameter in columns):
                continue
            view = make_view(weight, axis.dim, axis.indices)
            if view is not None:
                views.append(view)
        return views

    def count_rounds(self, groups: Sequence[Sequence[CoupledSet]]) -> int:
        """Returns the most rounds that the search of all sets takes."""
        climbs = self.options.rounds + self.options.escapes * (self.options.rounds // 4)
        return climbs * sum(map(len, groups))

    def run(self, bar: ProgressBar) -> Iterator[PermutedChannels]:
        """Searches and writes all sets; yields the rows of the report."""
        for group in self.group_sets():
            views = self.list_views(group[0])
            weights = {view.weight.name: view.weight for view in views}
            before = {name: weight.measure() for name, weight in weights.items()}
            start = len(self.applied)
            moved = sum(self.permute(one, bar) for one in group)
            after = {name: weight.measure() for name, weight in weights.items()}
            if sum(after.values()) <= sum(before.values()):
                self.undo(start)
                moved, after = 0, before
            yield PermutedChannels(
                tuple(group[0].list_parameters(0)),
                tuple(group[0].list_parameters(1)),
                group[0].channels,
                len(group),
                moved,
                sum(before.values()) / len(before),
                sum(after.values()) / len(after),
            )

    def permute(self, coupled: CoupledSet, bar: ProgressBar) -> int:
        """Searches the order of a set and writes it; returns how many channels moved."""
        order = search_order(self.list_views(coupled), coupled.channels, self.options, bar.update)
        self.write(coupled, order)
        self.applied.append((coupled, order))
        return int((order != np.arange(len(order))).sum())

    def write(self, coupled: CoupledSet, order: Places) -> None:
        """Permutes the model's tensors, and the scores."""
        apply_order(self.tensors, coupled, order)
        apply_order({name: w.scores for name, w in self.scored.items()}, coupled, order)

    def undo(self, start: int = 0) -> None:
        """Takes back what was written, from number ``start`` on."""
        while len(self.applied) > start:
            coupled, order = self.applied.pop()
            self.write(coupled, invert_order(order))

    def explain_weights(self, before: Mapping[str, float]) -> tuple[WeightEnergy, ...]:
        """Returns the rows of the report about weights."""
        searched = {
            axis.parameter for group in self.group_sets() for axis in group[0].axes if axis.dim == 1
        }
        return tuple(
            WeightEnergy(
                name,
                str(weight.pattern),
                before[name],
                weight.measure(),
                "" if name in searched else self.explain_refusal(name, weight),
            )
            for name, weight in self.scored.items()
        )

    def explain_refusal(self, name: str, weight: ScoredWeight) -> str:
        """Returns why the input channels of a weight are not permuted, as a sentence."""
        reasons = self.couplings.reasons.get((name, 1))
        if reasons is None:
            return "it is read inside an op that shows no rows and columns"
        if reasons:
            return f"its input channels stay: {reasons[0]}"
        sizes = [
            one.channels
            for one in self.couplings.sets
            for axis in one.axes
            if (axis.parameter, axis.dim) == (name, 1)
        ]
        if not sizes:
            return "no two of its input channels are treated alike"
        return (
            f"its input channels may change places only within sets of {max(sizes)}, which lie in "
            f"one group of {weight.pattern}"
        )
