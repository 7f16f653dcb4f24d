"""The reference U-ViT and the models of the paper."""

from __future__ import annotations

from .uvit import UViT, UViTConfig

__all__ = ["UViT", "UViTConfig"]
