"""Names of parameters."""

from __future__ import annotations

import re
from functools import lru_cache

_ADAPTERS = r"base_layer|original_module|modules_to_save\.[^.]+"
_WRAPPERS = r"_orig_mod|_checkpoint_wrapped_module"
_WRAPPED = re.compile(rf"\.(?:{_ADAPTERS}|{_WRAPPERS})(?=\.)")


@lru_cache(maxsize=1 << 16)
def strip_adapter_prefix(name: str) -> str:
    """Returns the name that a parameter had before its layer was wrapped.

    By an adapter (peft), ``torch.compile`` or torch's ``checkpoint_wrapper``. A copy of a layer that
    is trained whole beside adapters takes the name of the layer, whose place it has.

    >>> strip_adapter_prefix("attn.base_layer.weight")
    'attn.weight'
    >>> strip_adapter_prefix("norm.modules_to_save.default.weight")
    'norm.weight'
    >>> strip_adapter_prefix("blocks.0._orig_mod.fc1.weight")
    'blocks.0.fc1.weight'
    """
    return _WRAPPED.sub("", name)
