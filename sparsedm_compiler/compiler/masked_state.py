"""The values that a compiled model runs, and a plain copy of it that holds them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ConfigError
from .frozen_masks import mask_frozen
from .guarded_forward import SparseForward
from .lookup import require_compiled
from .read_guard import describe_function, remove_hooks
from .sparse_method import list_methods
from .stand_in import StandIn
from .state_hooks import mask_state_dict, remove_state_hooks

Model = TypeVar("Model", bound=nn.Module)

_REMOVED = object()
"""Stands in a copy for what ``compile`` has put into the model."""


def read_masked_state(forward: SparseForward) -> dict[str, Any]:
    """Returns the state_dict of a compiled module with the values that its calls read.

    Pruned weights are masked, dense with zeros; all others are the module's own tensors.
    """
    module, weights = forward.module, forward.weights
    state = weights.state_dict_without_finalized(module)
    mask_frozen(module, forward.frozen, state)
    mask_state_dict(module, forward.decisions, state)
    for name, packed in weights.iterate_finalized(module):
        state[name] = packed.unpack()
    return state


@torch.no_grad()
def copy_masked(model: Model) -> Model:
    """Returns a plain model of the same class whose pruned weights are masked for good.

    It knows nothing of this package, and shares with ``model`` every tensor that is not pruned.

    Args:
        model: A compiled model that has been called, or a module that holds some.

    Raises:
        ConfigError: If nothing inside was compiled, a forward is wrapped, or a part cannot be
            copied.
    """
    forwards = require_compiled(model)
    memo: dict[int, Any] = {id(x): x for x in chain(model.parameters(), model.buffers())}
    for _, forward in forwards:
        _require_unwrapped(forward)
        state = read_masked_state(forward)
        for name, weight in forward.module.named_parameters(remove_duplicate=False):
            if name in state and not _shares_memory(weight, state[name]):
                memo[id(weight)] = nn.Parameter(state[name], requires_grad=False)
        stand_ins = (v for v in forward.module.__dict__.values() if isinstance(v, StandIn))
        installed = (forward, *list_methods(forward.module), *stand_ins)
        memo.update({id(value): _REMOVED for value in installed})
    try:
        plain = copy.deepcopy(model, memo)
    except RuntimeError as error:
        raise ConfigError(f"{type(model).__name__} cannot be copied: {error}") from error
    for prefix, forward in forwards:
        _restore_own_methods(plain.get_submodule(prefix.removesuffix(".")), forward, memo)
    return plain


def _require_unwrapped(forward: SparseForward) -> None:
    """Raises ConfigError for a forward that another library has wrapped, as accelerate does."""
    outer = forward.module.__dict__.get("forward")
    if outer is not forward:
        raise ConfigError(
            f"the forward of {type(forward.module).__name__} is wrapped by "
            f"{describe_function(outer)}: unwrap it first "
            "(accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )


def _shares_memory(weight: torch.Tensor, value: torch.Tensor) -> bool:
    """Returns whether a value of a state_dict is the parameter itself."""
    return weight.data_ptr() == value.data_ptr() and weight.stride() == value.stride()


def _restore_own_methods(module: nn.Module, forward: SparseForward, memo: dict[int, Any]) -> None:
    """Gives a copied module its own forward and methods again, and takes the guard out."""
    for name, value in [*module.__dict__.items()]:
        if value is _REMOVED:
            del module.__dict__[name]
    own = {"forward": forward.override}
    own.update({method.name: method.override for method in list_methods(forward.module)})
    for name, override in own.items():
        if override is not None:
            module.__dict__[name] = copy.deepcopy(override, memo)
    remove_state_hooks(module)
    for child in module.modules():
        remove_hooks(child, module)
        child._forward_pre_hooks = OrderedDict(child._forward_pre_hooks)
