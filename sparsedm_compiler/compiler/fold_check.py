"""One quick check that nothing has changed since the weights of a graph were folded."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.kernel_family import WeightFormat
from .edit_watch import HostSamples, WeightSample
from .folded_weights import FoldedWeights

Row = tuple[int, weakref.ref[Tensor], int, int]
"""A weight as it was folded: its place among the inputs, itself, version counter and address."""


class FoldCheck:
    """Tells whether the weights of a graph are what was folded, in one loop over all of them.

    ``generation``: of the folded weights when this was made. ``forms``: their folded forms by
    place. ``samples``: values of the weights whose device can be read at once; all are compared
    in one go.
    """

    def __init__(
        self,
        generation: int,
        rows: Sequence[Row],
        forms: Mapping[int, Tensor],
        samples: Sequence[WeightSample],
    ) -> None:
        self.generation = generation
        self._rows = rows
        self._forms = forms
        self._samples = HostSamples(samples)

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Returns whether the weights among the inputs are as folded, and need no gradient."""
        trained = torch.is_grad_enabled()
        for position, reference, version, pointer in self._rows:
            weight: Tensor = inputs[position]
            if reference() is not weight or weight._version != version:
                return False
            if weight.data_ptr() != pointer or (trained and weight.requires_grad):
                return False
        return self._samples.hold()

    def replace(self, arguments: list[Any]) -> None:
        """Puts the folded forms in the place of the weights."""
        for position, folded in self._forms.items():
            arguments[position] = folded


def make_check(
    weights: FoldedWeights,
    folds: Sequence[tuple[int, WeightFormat, str]],
    inputs: Sequence[Any],
    arguments: Sequence[Any],
) -> FoldCheck | None:
    """Returns a check of the weights of a graph; None where one has no version counter.

    Args:
        weights: The folded weights of the model.
        folds: (position, format, name) of each weight of the graph.
        inputs: What the graph was called with.
        arguments: The same with the folded forms in the place of the weights.
    """
    rows: list[Row] = []
    samples = []
    for position, weight_format, _ in folds:
        weight = inputs[position]
        if weight.is_inference():
            return None
        rows.append((position, weakref.ref(weight), weight._version, weight.data_ptr()))
        sample = weights.find_samples(weight, weight_format)
        if sample is not None:
            samples.append(sample)
    forms = {position: arguments[position] for position, _, _ in folds}
    return FoldCheck(weights.generation, rows, forms, samples)
