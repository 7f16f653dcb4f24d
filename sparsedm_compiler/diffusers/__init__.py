"""The plugin for diffusers: importing it makes ``from_pretrained`` know ``SparseConfig``."""

from __future__ import annotations

from functools import partial

from ..optional_deps import is_installed
from .attach import attach
from .config import SparseConfig
from .registration import follow_configs, follow_single_files, register, register_backend

__all__ = ["SparseConfig", "attach"]

if is_installed("diffusers"):  # without it there is nothing to plug in
    from .quantizer import SparseQuantizer, adopt_by_config

    register(SparseConfig, SparseQuantizer)
    register_backend(SparseConfig)
    follow_single_files(adopt_by_config)
    follow_configs(partial(adopt_by_config, new=True))
