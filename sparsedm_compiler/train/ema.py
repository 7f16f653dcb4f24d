"""``Ema``: the exponential moving average of a model's parameters, held beside the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..packed_tensors import explain_packed
from .fsdp import copy_rows_into


class Ema:
    """``ema <- decay ema + (1 - decay) weights``, starting from the current weights.

    ``decay`` warms up: after n updates it is ``min(decay, (1 + n) / (10 + n))``. One tensor per
    parameter, laid out (and sharded) as the parameter; that of one in 16 bits which trains is in
    float32, as it would lose what an update adds. Buffers are those of the model, as are weights
    that a library has packed or quantized; integers, of frozen weights in 8 bits, stay.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        plain = {n: w for n, w in model.named_parameters() if explain_packed(w) is None}
        self._names, self._weights = [*plain], [*plain.values()]
        self._values = [
            weight.detach().to(get_average_dtype(weight), copy=True) for weight in self._weights
        ]
        moving = [k for k, weight in enumerate(self._weights) if weight.is_floating_point()]
        self._moving_weights = [self._weights[k] for k in moving]
        self._moving_values = [self._values[k] for k in moving]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [
            weight.detach().to(value.dtype)
            for weight, value in zip(self._moving_weights, self._moving_values, strict=True)
        ]
        torch._foreach_lerp_(self._moving_values, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Runs the block with the average in the model; the weights come back afterwards."""
        own = [weight.detach().clone() for weight in self._weights]
        self._copy_to_model(self._values)
        try:
            yield
        finally:
            self._copy_to_model(own)

    @torch.no_grad()
    def restart(self) -> None:
        """Begins anew from the model's current weights."""
        self.updates = 0
        for weight, value in zip(self._weights, self._values, strict=True):
            value.copy_(weight.detach())

    @contextmanager
    def edited(self) -> Iterator[None]:
        """Runs the block with the average in the model, and keeps what the block makes of it."""
        with self.applied():
            yield
            for weight, value in zip(self._weights, self._values, strict=True):
                value.copy_(weight.detach())

    @torch.no_grad()
    def _copy_to_model(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def copy_to_model(self) -> None:
        """Overwrites the model's weights with the average."""
        self._copy_to_model(self._values)

    def copy_model(self, model: nn.Module) -> nn.Module:
        """Returns a copy of ``model`` (the one that is averaged) that holds the average."""
        with self.applied():
            return copy.deepcopy(model)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the average by parameter name."""
        return dict(zip(self._names, self._values, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restores the average from ``state`` after ``updates`` updates."""
        for name, value in zip(self._names, self._values, strict=True):
            copy_rows_into(value, state[name])
        self.updates = updates


def get_average_dtype(weight: Tensor) -> torch.dtype:
    """Returns the dtype in which a parameter is averaged."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return wide if weight.requires_grad else weight.dtype
