"""The plugin for diffusers: importing it makes ``from_pretrained`` know ``SparseConfig``."""

from __future__ import annotations

from ..optional_deps import is_installed
from .attach import attach
from .config import SparseConfig
from .registration import register

__all__ = ["SparseConfig", "attach"]

if is_installed("diffusers"):  # without it there is nothing to plug in
    from .quantizer import SparseQuantizer

    register(SparseConfig, SparseQuantizer)
