"""The reference U-ViT and the models of the paper."""

from __future__ import annotations

from .inputs import example_inputs
from .presets import PRESETS, preset
from .uvit import UViT, UViTConfig

__all__ = ["PRESETS", "UViT", "UViTConfig", "example_inputs", "preset"]
