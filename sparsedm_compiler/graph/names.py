"""Names of parameters."""

from __future__ import annotations


def base_name(name: str) -> str:
    """The name a parameter had before an adapter (peft) wrapped its layer."""
    return name.replace(".base_layer.", ".")
