"""Names of parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from torch import nn

_ADAPTERS = r"base_layer|original_module|modules_to_save\.[^.]+"
_WRAPPERS = r"_orig_mod|_checkpoint_wrapped_module"
_WRAPPED = re.compile(rf"\.(?:{_ADAPTERS}|{_WRAPPERS})(?=\.)")


@lru_cache(maxsize=1 << 16)
def strip_adapter_prefix(name: str) -> str:
    """Returns the name that a parameter had before its layer was wrapped.

    By an adapter (peft), ``torch.compile`` or torch's ``checkpoint_wrapper``. A copy of a layer
    that is trained whole beside adapters takes the name of the layer, whose place it has.

    >>> strip_adapter_prefix("attn.base_layer.weight")
    'attn.weight'
    >>> strip_adapter_prefix("norm.modules_to_save.default.weight")
    'norm.weight'
    >>> strip_adapter_prefix("blocks.0._orig_mod.fc1.weight")
    'blocks.0.fc1.weight'
    """
    return _WRAPPED.sub("", name)


def list_adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Returns the names of the parameters that adapters (peft) have added to a model's own."""
    return frozenset(_iterate_adapter_parameters(model))


def _iterate_adapter_parameters(model: nn.Module) -> Iterator[str]:
    for prefix, layer in model.named_modules():
        if not any(base.__name__ == "BaseTunerLayer" for base in type(layer).__mro__):
            continue
        for part in layer.adapter_layer_names:  # such as lora_A
            for name, _ in layer.named_parameters(remove_duplicate=False):
                if name.partition(".")[0] == part:
                    yield f"{prefix}.{name}" if prefix else name
