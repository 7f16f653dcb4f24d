"""A compiled graph that is called with folded weights in the place of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..passes import PlannedWeight
from .folded_weights import FoldedWeights


class FoldedGraph:
    """Runs a graph with its planned weights in their folded form."""

    def __init__(
        self, run: Callable[..., Any], plan: Iterable[PlannedWeight], weights: FoldedWeights
    ) -> None:
        self.run = run
        self.weights = weights
        self._folds = [(row.position, row.weight_format, row.name) for row in plan]

    def __call__(self, *inputs: Any) -> Any:
        arguments, weights = list(inputs), self.weights
        weights.detect_edits()
        for position, weight_format, name in self._folds:
            arguments[position] = weights.get(arguments[position], weight_format, name)
        weights.ask_devices()
        return self.run(*arguments)
