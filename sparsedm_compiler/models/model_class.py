"""One row per model class: its example inputs, its time scale and its presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import ConfigError

ExampleCall: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of one forward."""
Published: TypeAlias = tuple[str, Mapping[str, Any]]
"""Title and config of a published model."""


@dataclass(frozen=True, slots=True)
class InputRequest:
    """The inputs to make: number of samples, latent side, text tokens and frames.

    None stands for the value of the published model. Random values come from torch's global
    generator; on the meta device there are none.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    size: int | None = None
    tokens: int | None = None
    frames: int | None = None

    def side(self, default: int | None) -> int:
        """Returns the requested latent side, else ``default``, the model's own.

        Raises ConfigError where there is neither.
        """
        side = self.size if self.size is not None else default
        if side is None:
            raise ConfigError("this model's config has no sample_size: say which size to feed")
        return side

    def noise(self, *shape: int) -> Tensor:
        """Returns standard normal values [batch, *shape]."""
        return torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)

    def text(self, tokens: int, width: int) -> Tensor:
        """Returns standard normal values [batch, requested tokens or ``tokens``, width]."""
        return self.noise(self.tokens or tokens, width)

    def steps(self) -> Tensor:
        """Returns integer timesteps [batch] that differ from one another."""
        return 500 + 7 * torch.arange(self.batch, device=self.device)

    def unit_times(self) -> Tensor:
        """Returns ``steps`` divided by 1000, in ``dtype``, for models that count to 1."""
        return self.steps().to(self.dtype) / 1000

    def labels(self, classes: int) -> Tensor:
        """Returns class labels [batch]."""
        return torch.arange(self.batch, device=self.device) % classes

    def full(self, value: float, *shape: int) -> Tensor:
        """Returns a tensor [batch, *shape] filled with ``value``."""
        return torch.full((self.batch, *shape), value, device=self.device, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class ModelClass:
    """The facts about one class of models: example inputs and presets.

    ``name``: "UViT" or a class of diffusers; subclasses count as their base. ``make_inputs``:
    returns (args, kwargs) of a forward for the model's config. ``presets``: name -> title and
    config of every published model of this class.
    """

    name: str
    make_inputs: Callable[[Any, InputRequest], ExampleCall]
    presets: Mapping[str, Published] = field(default_factory=dict)
