"""Frees folded weights as soon as their model is moved to another device.

A pipeline that offloads moves whole models off its card to make room for the next one.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..graph.capture import KEY


def install_release(module: nn.Module) -> None:
    """Puts a method in the place of ``_apply``, by which a compiled model is moved and cast."""
    module.__dict__["_apply"] = types.MethodType(_apply, module)


# Named as what it stands for: a pickled method is found again by its name, then the class's own.
def _apply(module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    own: Callable[..., Any] = type(module)._apply
    moved = own(module, function, *args, **kwargs)
    forward = module.__dict__.get(KEY)
    if forward is not None:
        forward.weights.release_moved()
    return moved
