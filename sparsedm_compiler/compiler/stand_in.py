"""What ``compile`` sets on a module in the place of a method of every module."""

from __future__ import annotations

from torch import nn


class StandIn:
    """Stands in a compiled module's ``__dict__`` for a method of its class, and calls that."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module
