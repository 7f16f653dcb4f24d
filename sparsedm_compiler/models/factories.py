"""Models that a user's function returns: "package.module:function", with or without inputs."""

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
from ..optional_deps import mend_torchvision
from .example_inputs import example_inputs
from .model_class import ExampleCall
from .model_classes import find_model_class

CALL = "(model, args, kwargs)"


def import_function(name: str) -> Callable[..., Any]:
    """Imports the function "package.module:function", from the working directory too.

    Raises ConfigError where it cannot be imported or called.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")
    try:
        mend_torchvision()  # which the module may import, with diffusers
        imported = attrgetter(attribute)(import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import {name!r}: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(imported):
        raise ConfigError(f"{name} is not a function but {imported!r}")
    function: Callable[..., Any] = imported
    return function


def call_factory(
    name: str, options: Mapping[str, Any], device: str | torch.device | None
) -> tuple[nn.Module, ExampleCall | None]:
    """Calls the function ``name`` with ``options`` for a model and, if any, (args, kwargs).

    Both are moved to ``device``; None leaves them on their own. Raises ConfigError where the
    function cannot be called so, or returns anything else.
    """
    function = import_function(name)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ConfigError(f"{name} cannot be called with {dict(options)}: {error}") from error
    result = function(**options)
    model, *call = result if isinstance(result, tuple) else (result,)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned {type(model).__name__} where a model should be")
    args, kwargs = (*call, {})[:2] if call else ((), {})
    if len(call) > 2 or not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise ConfigError(f"{name} returned neither a model, (model, args) nor {CALL}")
    if device is not None:
        model = model.to(device)
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (tuple(args), kwargs))
    return model, (tuple(args), kwargs) if call else None


def choose_inputs(
    name: str, model: nn.Module, call: ExampleCall | None, inputs: str | None
) -> ExampleCall:
    """Returns (args, kwargs) for the model that the function ``name`` returned.

    They are the function's own ``call``, zeros of the shapes in ``inputs``, or the example inputs
    of a known class. Raises ConfigError for both of the first two, or none of the three.
    """
    if call is not None and inputs is not None:
        raise ConfigError(f"{name} returns its own inputs: drop --inputs {inputs}")
    if call is not None:
        return call
    if inputs is not None:
        return parse_inputs(inputs, model), {}
    if find_model_class(model) is not None:
        return example_inputs(model)
    raise ConfigError(f"{name} returns no inputs: give --inputs, e.g. 1x3x32x32,1")


def parse_inputs(text: str, model: nn.Module) -> tuple[Tensor, ...]:
    """Returns zeros of the shapes in "1x3x32x32,1:int64", in the model's dtype by default.

    Raises ConfigError for a shape or a dtype that cannot be read.
    """
    weight = next(iter(model.parameters()), torch.empty(0, device="cpu"))
    tensors = []
    for part in text.split(","):
        shape, _, kind = part.strip().partition(":")
        dtype = vars(torch).get(kind) if kind else weight.dtype
        try:
            sizes = [int(size) for size in shape.split("x")]
        except ValueError:
            sizes = [0]
        if min(sizes) < 1 or not isinstance(dtype, torch.dtype):
            raise ConfigError(f"input {part!r} is not a shape like 1x3x32x32 or 1:int64")
        tensors.append(torch.zeros(sizes, dtype=dtype, device=weight.device))
    return tuple(tensors)
