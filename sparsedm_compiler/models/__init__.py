"""The reference U-ViT, published models by name, and inputs to call them."""

from __future__ import annotations

from .example_inputs import example_inputs
from .loading import open_model, open_with_inputs
from .presets import PRESETS, preset
from .uvit import UViT
from .uvit_config import UViTConfig
from .weights import load_weights

__all__ = [
    "PRESETS",
    "UViT",
    "UViTConfig",
    "example_inputs",
    "load_weights",
    "open_model",
    "open_with_inputs",
    "preset",
]
