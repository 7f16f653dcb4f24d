"""Hooks of diffusers that carry state from call to call (caches), kept out of graphs.

A graph that holds such a hook guards its Python values: the number of the step, the timestep. So
every step of a sampling loop would be compiled anew. Where the hook itself is skipped, TorchDynamo
compiles what it calls, and once.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from .capture import copy_function

_REGISTRY = "_diffusers_hook"
"""The attribute under which diffusers keeps the hooks of a module."""


class StatefulHooksError(Exception):
    """Ends a capture that has traced the state of hooks."""


def isolate_stateful_hooks(model: nn.Module) -> bool:
    """Makes TorchDynamo skip the stateful hooks of a model; returns whether there were new ones.

    A hook's ``new_forward`` is exchanged for a copy with a code object of its own: others' hooks
    of the class stay as they are. So is the forward that it stands in for, since TorchDynamo keeps
    the graphs of equal layers in one list by their code, through which every call would look.
    """
    hooks = [hook for hook in _list_hooks(model) if not _is_isolated(hook)]
    for hook in hooks:
        function = copy_function(type(hook).new_forward)
        skipped = torch._dynamo.disable(function, recursive=False)  # type: ignore[no-untyped-call]
        (module,) = hook.fn_ref.forward.args
        original = hook.fn_ref.original_forward
        if _is_plain_method(original, module):
            own = types.MethodType(copy_function(original.__func__), module)
            hook.fn_ref.original_forward = own
        hook.fn_ref.forward = functools.partial(types.MethodType(skipped, hook), module)
    return bool(hooks)


def has_diffusers_hooks(module: nn.Module) -> bool:
    """Returns whether hooks of diffusers stand in for the forward of a module."""
    return bool(_get_hooks(module))


def _get_hooks(module: nn.Module) -> Collection[Any]:
    """Returns the hooks of diffusers that a module has."""
    registry = vars(module).get(_REGISTRY)
    return () if registry is None else registry.hooks.values()


def _list_hooks(model: nn.Module) -> Iterator[Any]:
    """Yields the stateful hooks that stand in for the forward of a module."""
    for module in model.modules():
        for hook in _get_hooks(module):
            if hook._is_stateful and _stands_in(hook):
                yield hook


def _stands_in(hook: Any) -> bool:
    forward = hook.fn_ref.forward
    return isinstance(forward, functools.partial) and isinstance(
        vars(type(hook)).get("new_forward"), types.FunctionType
    )


def _is_plain_method(forward: Any, module: nn.Module) -> bool:
    """Returns whether a forward is the module's method, and nothing that a decorator has made."""
    if not isinstance(forward, types.MethodType) or forward.__self__ is not module:
        return False
    return isinstance(forward.__func__, types.FunctionType) and not vars(forward.__func__)


def _is_isolated(hook: Any) -> bool:
    method = hook.fn_ref.forward.func
    return isinstance(method, types.MethodType) and vars(method.__func__).get(
        "_torchdynamo_disable", False
    )
