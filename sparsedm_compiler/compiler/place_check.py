"""One quick check that parameters of a model are where they were, in the model and in memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class PlaceCheck:
    """Tells whether a model still holds the same parameters, each at the same address.

    To walk through all parameters of a model takes a millisecond, which a call of a small one does
    not have; this looks up the modules on the ways to a few of them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Notes where the parameters of these names are."""
        steps: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._weights: list[Tensor] = []
        for name in names:
            *path, last = name.split(".")
            owner = model
            for part in path:
                child = owner._modules[part]
                assert child is not None
                steps[id(owner), part] = owner._modules, part, child
                owner = child
            weight = owner._parameters[last]
            assert weight is not None
            steps[id(owner), last] = owner._parameters, last, weight
            self._weights.append(weight)
        self._dicts = [step[0] for step in steps.values()]
        self._keys = [step[1] for step in steps.values()]
        self._values = [step[2] for step in steps.values()]
        self._addresses = [weight.data_ptr() for weight in self._weights]
        self._storages = [weight.detach() for weight in self._weights]  # or an address might return

    def holds(self) -> bool:
        """Returns whether nothing has moved."""
        now = map(dict.get, self._dicts, self._keys)
        if not all(map(operator.is_, now, self._values)):
            return False
        return [weight.data_ptr() for weight in self._weights] == self._addresses
