"""``Average``: the moving average of a model's parameters, beside the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .fsdp import put


class Average:
    """``average <- decay average + (1 - decay) weights``, from the weights of now.

    ``decay`` warms up: after n updates it is ``min(decay, (1 + n) / (10 + n))``. One tensor per
    parameter, laid out (and sharded) as the parameter; buffers are those of the model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._weights = [*model.parameters()]
        self._values = [weight.detach().clone() for weight in self._weights]
        self._names = [name for name, _ in model.named_parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._values, [w.detach() for w in self._weights], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the block with the average in the model; the weights come back."""
        own = [weight.detach().clone() for weight in self._weights]
        self._put(self._values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def put(self) -> None:
        """Make the average the weights of the model."""
        self._put(self._values)

    def module(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` (whose average this is) that holds the average."""
        with self.applied():
            return copy.deepcopy(model)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name."""
        return dict(zip(self._names, self._values, strict=True))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on from what ``state`` and ``updates`` were."""
        for name, value in zip(self._names, self._values, strict=True):
            put(value, state[name])
        self.updates = updates
