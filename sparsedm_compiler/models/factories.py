"""Models that a function of the user's makes: "package.module:function", and what calls them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import ConfigError
from .example_inputs import FEEDS, Call, example_inputs

CALL = "(model, args, kwargs)"


def import_function(name: str) -> Callable[..., Any]:
    """The function "package.module:function", looked for in the working directory too."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = attrgetter(attribute)(import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import {name!r}: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise ConfigError(f"{name} is not a function but {found!r}")
    function: Callable[..., Any] = found
    return function


def made_by(
    name: str, options: Mapping[str, Any], device: str | torch.device | None
) -> tuple[nn.Module, Call | None]:
    """The model that the function returns for ``options``, and the (args, kwargs) beside it.

    On ``device``, or where the function made them. Raises ConfigError for anything else.
    """
    function = import_function(name)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ConfigError(f"{name} cannot be called with {dict(options)}: {error}") from error
    made = function(**options)
    model, *call = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned {type(model).__name__} where a model should be")
    args, kwargs = (*call, {})[:2] if call else ((), {})
    if len(call) > 2 or not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise ConfigError(f"{name} returned neither a model, (model, args) nor {CALL}")
    if device is not None:
        model = model.to(device)
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (tuple(args), kwargs))
    return model, (tuple(args), kwargs) if call else None


def inputs_of(name: str, model: nn.Module, call: Call | None, inputs: str | None) -> Call:
    """(args, kwargs) for the function's model: its own, of the shapes given, or the class's."""
    if call is not None and inputs is not None:
        raise ConfigError(f"{name} returns its own inputs: drop --inputs {inputs}")
    if call is not None:
        return call
    if inputs is not None:
        return tensors(inputs, model), {}
    if any(base.__name__ in FEEDS for base in type(model).__mro__):
        return example_inputs(model)
    raise ConfigError(f"{name} returns no inputs: give --inputs, e.g. 1x3x32x32,1")


def tensors(text: str, model: nn.Module) -> tuple[Tensor, ...]:
    """Zeros of the shapes in "1x3x32x32,1:int64", in the model's dtype unless one is named."""
    weight = next(iter(model.parameters()), torch.empty(0))
    made = []
    for part in text.split(","):
        shape, _, kind = part.strip().partition(":")
        dtype = vars(torch).get(kind) if kind else weight.dtype
        try:
            sizes = [int(size) for size in shape.split("x")]
        except ValueError:
            sizes = [0]
        if min(sizes) < 1 or not isinstance(dtype, torch.dtype):
            raise ConfigError(f"input {part!r} is not a shape like 1x3x32x32 or 1:int64")
        made.append(torch.zeros(sizes, dtype=dtype, device=weight.device))
    return tuple(made)
