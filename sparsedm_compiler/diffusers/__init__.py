"""The plugin for diffusers: importing it makes ``from_pretrained`` know ``SparseConfig``."""

from __future__ import annotations

from .config import SparseConfig
from .quantizer import SparseQuantizer, attach
from .registration import register

__all__ = ["SparseConfig", "attach"]

register(SparseConfig, SparseQuantizer)
