"""Names of parameters."""

from __future__ import annotations


def strip_adapter_prefix(name: str) -> str:
    """The name a parameter had before an adapter (peft) wrapped its layer."""
    return name.replace(".base_layer.", ".")
