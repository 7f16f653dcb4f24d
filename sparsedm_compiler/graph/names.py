"""Names of parameters."""

from __future__ import annotations

import re
from functools import lru_cache

_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


@lru_cache(maxsize=1 << 16)
def strip_adapter_prefix(name: str) -> str:
    """Returns the name that a parameter had before an adapter (peft) wrapped its layer.

    A copy of a layer that is trained whole beside adapters takes the name of the layer, whose place
    it has.

    >>> strip_adapter_prefix("attn.base_layer.weight")
    'attn.weight'
    >>> strip_adapter_prefix("norm.modules_to_save.default.weight")
    'norm.weight'
    """
    return _WRAPPED.sub("", name)
