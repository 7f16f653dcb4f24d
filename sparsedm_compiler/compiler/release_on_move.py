"""Frees folded weights as soon as their model is moved to another device.

A pipeline that offloads moves whole models off its card to make room for the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..graph.capture import KEY


class ReleasingApply:
    """Stands in for ``_apply`` of a compiled model, by which it is moved and cast."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module = self._module
        own: Callable[..., Any] = type(module)._apply
        moved = own(module, function, *args, **kwargs)
        forward = module.__dict__.get(KEY)
        if forward is not None:
            forward.weights.release_moved()
        return moved


def install_release(module: nn.Module) -> None:
    """Makes a compiled model free what was folded where it lay."""
    module.__dict__["_apply"] = ReleasingApply(module)
