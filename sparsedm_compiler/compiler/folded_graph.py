"""A compiled graph that is called with folded weights in the place of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..passes import PlannedWeight
from .fold_check import FoldCheck, make_check
from .folded_weights import FoldedWeights


class FoldedGraph:
    """Runs a graph with its planned weights in their folded form."""

    def __init__(
        self, run: Callable[..., Any], plan: Iterable[PlannedWeight], weights: FoldedWeights
    ) -> None:
        self.run = run
        self.weights = weights
        self._folds = [(row.position, row.weight_format, row.name) for row in plan]
        self._check: FoldCheck | None = None
        weights.register(self)

    def __call__(self, *inputs: Any) -> Any:
        arguments, weights, check = list(inputs), self.weights, self._check
        weights.detect_edits()
        if check is not None and check.generation == weights.generation and check.holds(arguments):
            check.replace(arguments)
        else:
            self._check = check = None  # it holds forms that may be out of date
            for position, weight_format, name in self._folds:
                arguments[position] = weights.get(inputs[position], weight_format, name)
            self._check = make_check(weights, self._folds, inputs, arguments)
            weights.drop_stale_checks()
        out = self.run(*arguments)
        weights.ask_devices()  # now, while a device still computes
        return out

    def drop_stale_check(self) -> None:
        """Drops the check if weights have been folded or replaced since it was made."""
        if self._check is not None and self._check.generation != self.weights.generation:
            self._check = None
