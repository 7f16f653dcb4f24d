"""One quick check that nothing has changed since the weights of a graph were folded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.kernel_family import WeightFormat
from .edit_watch import HostSamples, WeightSample
from .folded_weights import FoldedWeights


class FoldCheck:
    """Tells whether the weights of a graph are what was folded, in one loop over all of them.

    ``generation``: of the folded weights when this was made. ``weights``: by place among the
    inputs. ``forms``: their folded forms by place. ``samples``: values of the weights whose device
    can be read at once; all are compared in one go.

    What a call costs is the number of Python objects that it touches, most of them cold.
    """

    def __init__(
        self,
        generation: int,
        weights: Mapping[int, Tensor],
        forms: Mapping[int, Tensor],
        samples: Sequence[WeightSample],
    ) -> None:
        self.generation = generation
        self._positions = [*weights]
        # Held, so that no other weight comes to lie at the address of one of these:
        self._weights = [*weights.values()]
        self._versions = [weight._version for weight in self._weights]
        self._addresses = [0] * (max(weights, default=-1) + 1)
        for position, weight in weights.items():
            self._addresses[position] = weight.data_ptr()
        self._forms = forms
        self._samples = HostSamples(samples)

    def holds(self, inputs: list[Any]) -> bool:
        """Returns whether the weights among the inputs are as folded, and need no gradient."""
        weights = [inputs[position] for position in self._positions]
        if not all(map(operator.is_, weights, self._weights)):
            return False
        if [weight._version for weight in weights] != self._versions:
            return False
        if not _lie_at(inputs, self._addresses, self._positions):
            return False
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return False
        return self._samples.hold()

    def replace(self, arguments: list[Any]) -> None:
        """Puts the folded forms in the place of the weights."""
        for position, folded in self._forms.items():
            arguments[position] = folded


def _lie_at_in_python(inputs: list[Any], addresses: list[int], positions: list[int]) -> bool:
    """Returns whether the inputs at some positions lie at the addresses at these positions."""
    return [inputs[k].data_ptr() for k in positions] == [addresses[k] for k in positions]


_lie_at: Callable[[list[Any], list[int], list[int]], bool] = vars(torch._C).get(
    "_tensors_data_ptrs_at_indices_equal", _lie_at_in_python
)
"""One loop in C++ over the addresses of tensors, which torch has in its builds for CUDA.

Torch's CUDA graphs call it the same way: positions count in both lists.
"""


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
    samples = []
    for position, weight_format, _ in folds:
        weight = inputs[position]
        if weight.is_inference():
            return None
        sample = weights.find_samples(weight, weight_format)
        if sample is not None:
            samples.append(sample)
    folded = {position: inputs[position] for position, _, _ in folds}
    forms = {position: arguments[position] for position, _, _ in folds}
    return FoldCheck(weights.generation, folded, forms, samples)
