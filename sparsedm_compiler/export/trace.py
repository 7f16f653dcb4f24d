"""A compiled model -> ``torch.export.ExportedProgram`` of the plain model with masked weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves, tree_map

from ..compiler.lookup import masked_parameters, require_compiled
from ..compiler.masked_state import copy_masked
from ..errors import CaptureError, CheckpointError, ConfigError, SparseDMError
from ..graph.capture import Names, map_parameter_names
from ..patterns import Pattern

_ASIDES = "The error above|Suggested fixes|While executing|Original traceback"
"""Where messages of torch begin to be about something else."""

_WRAPPERS = (torch._dynamo.OptimizedModule, nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, slots=True)
class Example:
    """One call of a model.

    Attributes:
        args: Its positional inputs.
        kwargs: Its keyword inputs.
        dynamic: What ``torch.export`` takes as ``dynamic_shapes``; None for fixed shapes.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic: Any = None


@dataclass(frozen=True, slots=True)
class MaskedProgram:
    """A traced model.

    Attributes:
        program: The plain model with masked weights, as ``torch.export`` holds it.
        patterns: The patterns of its pruned parameters, by all names that a parameter has.
    """

    program: ExportedProgram
    patterns: Mapping[Names, Pattern]


def make_example(
    args: Any,
    kwargs: Mapping[str, Any] | None,
    *,
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
) -> Example:
    """Returns a call with its dynamic sizes. Raises ConfigError where they cannot be had.

    args: a tuple, or the only input. Its tensors are copied without their values, since
    ``torch.export`` writes on a tensor which of its sizes are dynamic, for all later calls.
    """
    inputs = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        return copies.setdefault(id(leaf), leaf.detach()) if isinstance(leaf, Tensor) else leaf

    named = dict(kwargs or {})
    if not isinstance(dynamic_shapes, ShapesCollection):  # which knows them as they are
        inputs, named = tree_map(copy, (inputs, named))
    example = Example(inputs, named, dynamic_shapes)
    if not dynamic_batch:
        return example
    if dynamic_shapes is not None:
        raise ConfigError("dynamic_batch and dynamic_shapes exclude each other: give one of them")
    tensors = [x for x in tree_leaves((inputs, example.kwargs)) if isinstance(x, Tensor)]
    batch = next((x.shape[0] for x in tensors if x.dim()), 1)
    if batch < 2:
        raise ConfigError(
            "dynamic_batch needs example inputs with a batch of 2 or more: with 1, inputs of one "
            "row cannot be told from inputs that all rows share"
        )
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for x in tensors:
        if x.dim() and x.shape[0] == batch:
            shapes[x] = {0: Dim.DYNAMIC}  # a named one would refuse branches on large batches
    return Example(inputs, example.kwargs, shapes)


def require_folder(file: Path) -> None:
    """Raises CheckpointError unless the folder of a file to write is there, and no folder it is."""
    if file.is_dir():
        raise CheckpointError(f"{file} cannot be written: it is a folder")
    if not file.parent.is_dir():
        raise CheckpointError(f"{file} cannot be written: there is no folder {file.parent}")


@torch.no_grad()
def trace_masked(model: nn.Module, example: Example) -> MaskedProgram:
    """Traces the plain model that a compiled model is equal to.

    A model that has not been called yet is called once, so that its weights are chosen.

    Raises:
        ConfigError: If ``model`` was not compiled, is in training mode or wrapped, or a size cannot
            be dynamic.
        CaptureError: If ``torch.export`` cannot hold the forward.
    """
    if isinstance(model, _WRAPPERS):
        raise ConfigError(f"{type(model).__name__} wraps the model: export the model inside it")
    forwards = require_compiled(model)
    if any(module.training for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} is in training mode, in which dropout and batch norm do other "
            "things than in inference: model.eval() first"
        )
    if any(not forward.decisions for _, forward in forwards):
        _call(model, example)
    names = map_parameter_names(model)
    patterns = {names[id(w)]: pattern for w, pattern in masked_parameters(model).values()}
    return MaskedProgram(export_plain(copy_masked(model), type(model).__name__, example), patterns)


def _call(model: nn.Module, example: Example) -> None:
    """Calls a model once. Raises CaptureError where it does not take the example."""
    try:
        model(*example.args, **example.kwargs)
    except SparseDMError:
        raise
    except Exception as error:  # of many kinds, from the model's own code
        name = type(model).__name__
        raise CaptureError(f"{name} fails on the example: {summarize(error)}") from error


def export_plain(plain: nn.Module, name: str, example: Example) -> ExportedProgram:
    """Runs ``torch.export``, and says in one sentence what broke where it fails."""
    shapes = example.dynamic
    kwargs = dict(example.kwargs)
    try:
        if isinstance(shapes, ShapesCollection):
            shapes = shapes.dynamic_shapes(plain, example.args, kwargs)  # type: ignore[no-untyped-call]
        return torch.export.export(plain, example.args, kwargs, dynamic_shapes=shapes, strict=False)
    except SparseDMError:
        raise
    except Exception as error:  # of many kinds, from Dynamo, fx and the model's own code
        text = summarize(error)
        if example.dynamic is not None and _is_about_sizes(error):
            raise ConfigError(f"{name} cannot have these dynamic sizes: {text}") from error
        raise CaptureError(f"torch.export cannot hold the forward of {name}: {text}") from error


def _is_about_sizes(error: Exception) -> bool:
    """Returns whether an error of ``torch.export`` is about sizes that cannot be dynamic."""
    text = str(error)
    signs = ("as dynamic", "Constraints violated", "specializ", "Dim(")
    return any(sign in text for sign in signs)


def summarize(error: BaseException, limit: int = 300) -> str:
    """Returns the kind of an error and the beginning of its message, on one line."""
    told = re.split(_ASIDES, str(error))[0]
    words = " ".join(re.sub("For more information, run with [^ ]*", "", told).split())
    short = words if len(words) <= limit else words[:limit].rsplit(" ", 1)[0] + " …"
    return f"{type(error).__name__}: {short}" if short else type(error).__name__


def require_inputs(program: ExportedProgram, names: Sequence[str] | None) -> None:
    """Raises ConfigError for more names than inputs."""
    count = len(program.graph_signature.user_inputs)
    if names is not None and len(names) > count:
        raise ConfigError(f"input_names names {len(names)} of {count} inputs")


def name_outputs(program: ExportedProgram, names: Sequence[str] | None) -> list[str]:
    """Returns the names of the outputs: those that are wanted, else their keys in the output.

    Raises ConfigError for another number of names than of outputs.
    """
    outputs = program.graph_signature.user_outputs
    if names is not None:
        if len(names) != len(outputs):
            raise ConfigError(f"output_names names {len(names)} of {len(outputs)} outputs")
        return [*names]
    tree = program.call_spec.out_spec
    keys = tree.context if isinstance(tree.context, (list, tuple)) else ()
    if len(keys) == len(outputs) and all(isinstance(key, str) for key in keys):
        taken = {*program.graph_signature.user_inputs}
        return [f"out_{key}" if key in taken else key for key in keys]
    return ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
