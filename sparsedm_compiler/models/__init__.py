"""The reference U-ViT and the models of the paper."""

from __future__ import annotations

from .example_inputs import example_inputs
from .loading import open_called, open_model
from .presets import PRESETS, preset
from .uvit import UViT, UViTConfig
from .weights import load_weights

__all__ = [
    "PRESETS",
    "UViT",
    "UViTConfig",
    "example_inputs",
    "load_weights",
    "open_called",
    "open_model",
    "preset",
]
