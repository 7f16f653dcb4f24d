"""Published models by name: those of the paper and their successors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, suggest
from ..optional_deps import import_diffusers
from .example_inputs import example_inputs
from .model_class import ExampleCall
from .model_classes import MODEL_CLASSES
from .uvit import UViT


@dataclass(frozen=True, slots=True)
class Preset:
    """A model to build: its title, its class and its config.

    ``class_name``: "UViT" or a class of diffusers.
    """

    about: str
    class_name: str
    config: Mapping[str, Any]

    def build(self) -> nn.Module:
        """Returns the model, freshly initialised on torch's current device."""
        if self.class_name == "UViT":
            return UViT(**self.config)
        return from_diffusers(self.class_name, self.config)

    def inputs(self, model: nn.Module, batch: int = 1) -> ExampleCall:
        """Returns (args, kwargs) of one forward at the published resolution."""
        return example_inputs(model, batch=batch)


PRESETS: Mapping[str, Preset] = {
    name: Preset(title, row.name, config)
    for row in MODEL_CLASSES.values()
    for name, (title, config) in row.presets.items()
}
"""Every model that ``preset`` knows, by name."""


def preset(
    name: str, device: str | torch.device = "meta", batch: int = 1
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Returns a published model with random weights, and the inputs of one forward.

    Args:
        name: A name in ``PRESETS``, e.g. "uvit-cifar10-small" or "sd15".
        device: Device of the model and its inputs. On the meta device, the default, there are
            shapes and no values.
        batch: Number of samples in the inputs.

    Returns:
        (model, args, kwargs), for ``model(*args, **kwargs)``.

    Raises:
        ConfigError: The name is unknown, or diffusers is needed and not installed.

    Example:
        >>> model, args, kwargs = preset("uvit-cifar10-small")
        >>> sum(param.numel() for param in model.parameters())
        44255328
        >>> model(*args, **kwargs).shape
        torch.Size([1, 3, 32, 32])
    """
    entry = find_preset(name)
    with torch.device(device):
        model = entry.build()
    args, kwargs = entry.inputs(model, batch)
    return model, args, kwargs


def find_preset(name: str) -> Preset:
    """Returns the preset called ``name``.

    Raises ConfigError, which suggests close names, where there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; {suggest(name, PRESETS, 'known:')}")
    return PRESETS[name]


def from_diffusers(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """Builds a freshly initialised model of a diffusers class.

    Raises ConfigError where diffusers has no such model.
    """
    diffusers = import_diffusers()
    try:
        cls: Any = getattr(diffusers, class_name)
    except AttributeError:
        raise ConfigError(
            f"diffusers {diffusers.__version__} has no class {class_name!r}"
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"diffusers.{class_name} is not a model")
    model: nn.Module = cls.from_config(dict(config))  # type: ignore[attr-defined]
    return model
