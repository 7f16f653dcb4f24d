"""Names of parameters."""

from __future__ import annotations


def strip_adapter_prefix(name: str) -> str:
    """Returns the name that a parameter had before an adapter (peft) wrapped its layer.

    >>> strip_adapter_prefix("attn.base_layer.weight")
    'attn.weight'
    """
    return name.replace(".base_layer.", ".")
