"""Capture of the graphs of a model, through TorchDynamo.

Dynamo keeps its cache on code objects, so all instances of a class share one cache and one
recompile limit, and past the limit it silently runs the original forward. Here every capture runs
a private copy of the code object under settings that raise instead.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch._dynamo
from torch import fx, nn
from torch._dynamo.exc import (
    BackendCompilerFailed,
    TorchRuntimeError,
    UncapturedHigherOrderOpError,
    Unsupported,
    UserError,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import CaptureError, SparseDMError
from .closures import list_wrapped
from .dynamo_settings import SETTINGS
from .flat_graph import Op

GRAPH_BREAK_ERRORS = (
    *(Unsupported, UncapturedHigherOrderOpError, UserError),
    *(TorchRuntimeError, GuardOnDataDependentSymNode),
)
"""Errors that Dynamo raises for a forward that does not fit one graph."""

Names = tuple[str, ...]
"""All names of one parameter in its model; more than one where weights are tied."""


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """One graph of a model.

    Attributes:
        gm: The graph, as Dynamo made it.
        names: All names of each placeholder that is a parameter.
        buffers: Placeholders that are buffers. Every other placeholder is an input of the call.
    """

    gm: fx.GraphModule
    names: Mapping[fx.Node, Names]
    buffers: frozenset[fx.Node] = frozenset()

    def map_parameters(self, ops: Sequence[Op]) -> dict[Op, Names]:
        """Returns those of ``ops`` (``flatten(gm)``) that are parameters, with their names."""
        return {op: self.names[op.node] for op in ops if op.node in self.names}


KEY = "_sparsedm"
"""Where a compiled module keeps what replaced its forward, beside ``forward``, in ``__dict__``."""


class OwnForward:
    """Base of callables that replace a module's own forward and remember it.

    Attributes:
        override: The forward that was set on the instance before; None for the class's forward.
    """

    __slots__ = ()
    override: Callable[..., Any] | None

    @property
    def __func__(self) -> Callable[..., Any]:
        """The forward as a function of (self, ...): wrappers rewrap methods by it (accelerate)."""
        return call_compiled


def call_compiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the guarded forward of a compiled module, which a copy of the module has its own of."""
    return module.__dict__[KEY](*args, **kwargs)


def find_own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the forward that is set on the instance, other than ours; None for the class's.

    A wrapper around ours (of accelerate, ``torch.autocast``) is not the module's own; a forward
    that replaced ours is.
    """
    forward, ours = module.__dict__.get("forward"), module.__dict__.get(KEY)
    if isinstance(ours, OwnForward) and (forward is None or wraps_forward(module, ours)):
        return ours.override
    return forward.override if isinstance(forward, OwnForward) else forward


def wraps_forward(module: nn.Module, ours: OwnForward) -> bool:
    """Returns whether the forward of the instance is ``ours`` or calls it.

    A wrapper refers to what it wraps by ``__wrapped__``, a closure, a partial, or an attribute of
    the module (accelerate's ``_old_forward``).
    """
    if any(value is ours for name, value in module.__dict__.items() if name != KEY):
        return True
    pending: list[Any] = [module.__dict__.get("forward")]
    seen: list[Any] = []
    while pending:
        function = pending.pop()
        if function is ours or function is call_compiled:
            return True
        if function is None or any(function is other for other in seen):
            continue
        seen.append(function)
        pending.extend(list_wrapped(function))
    return False


def copy_forward(module: nn.Module) -> Callable[..., Any]:
    """Returns the module's own forward as a function of (self, ...) with its own code object."""
    return copy_method(module, "forward", find_own_forward(module))


def copy_method(
    module: nn.Module, name: str, override: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Returns a method of a module as a function of (self, ...) with its own code object.

    Args:
        module: The module.
        name: The method's name in the class.
        override: What was set on the instance under that name; None for the class's method.

    Raises:
        CaptureError: If the method is not a Python function.
    """
    if override is None:
        method = getattr(type(module), name)
    elif isinstance(override, types.MethodType) and override.__self__ is module:
        method = override.__func__
    else:
        method = _unbind(override)
    if not isinstance(method, types.FunctionType):
        raise CaptureError(
            f"{type(module).__name__}.{name} is a {type(method).__name__}, not a Python "
            "function, so it cannot be captured; compile the eager module it was made from"
        )
    return copy_function(method)


def copy_function(function: types.FunctionType) -> types.FunctionType:
    """Returns the same function with a code object of its own, which Dynamo keeps apart."""
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _unbind(bound: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of (self, ...) that ignores ``self``."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    return forward


def map_parameter_names(module: nn.Module) -> dict[int, Names]:
    """Returns all names of each parameter by its id, in the order of ``named_parameters``."""
    names: dict[int, Names] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def bind_parameters(
    gm: fx.GraphModule, example_inputs: Sequence[Any], module: nn.Module
) -> CapturedGraph:
    """Returns ``gm`` with those of its placeholders named that are parameters of ``module``."""
    names, buffers = map_parameter_names(module), {id(buffer) for buffer in module.buffers()}
    inputs = list(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    return CapturedGraph(
        gm,
        {node: names[id(x)] for node, x in inputs if id(x) in names},
        frozenset(node for node, x in inputs if id(x) in buffers),
    )


def bind_parameters_by_source(gm: fx.GraphModule) -> CapturedGraph:
    """Returns ``gm`` with its placeholders named by Dynamo's sources, for an unknown module."""
    names: dict[fx.Node, Names] = {}
    buffers = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        source = node.meta["grapharg"].source.name if "grapharg" in node.meta else ""
        text = source if isinstance(source, str) else source()  # a method in older torch
        path = ".".join(re.findall(r"_(?:modules|parameters)'?\]?\['([^']+)'\]", text))
        if "_parameters" in text and path:
            names[node] = (path,)
        elif "_buffers" in text:
            buffers.add(node)
    return CapturedGraph(gm, names, frozenset(buffers))


def raise_own_error(error: RuntimeError) -> None:
    """Raises the SparseDMError of a backend, if ``error`` is Dynamo's wrapper around one."""
    inner = error.inner_exception if isinstance(error, BackendCompilerFailed) else None
    if isinstance(inner, SparseDMError):
        raise inner from None


class _Stop(Exception):  # noqa: N818
    """Ends a capture in place of the first run of the graph."""


def capture(module: nn.Module, *args: Any, **kwargs: Any) -> CapturedGraph | None:
    """Captures the graph of one call of a module, without running it.

    Args:
        module: The module; its parameters and inputs may be meta tensors.
        *args: Positional arguments of its forward.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The graph with its parameters and buffers named; None if the forward takes more than one
        graph.

    Raises:
        CaptureError: If the forward is not a Python function, if TorchDynamo is switched off, or
            if the forward does no tensor work.

    Example:
        >>> graph = capture(nn.Linear(4, 2), torch.empty(3, 4))
        >>> sorted(graph.names.values())
        [('bias',), ('weight',)]
    """
    captured = capture_inputs(module, *args, **kwargs)
    return None if captured is None else captured[0]


def capture_inputs(
    module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[CapturedGraph, list[Any]] | None:
    """Captures as ``capture`` does; returns the graph and the values of its placeholders."""
    graphs: list[tuple[CapturedGraph, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((bind_parameters(gm, example_inputs, module), list(example_inputs)))
        return _stop

    run = torch.compile(copy_forward(module), backend=backend, fullgraph=True, dynamic=False)
    try:
        with torch._dynamo.config.patch(SETTINGS):
            run(module, *args, **kwargs)
    except _Stop:
        return graphs[0]
    except GRAPH_BREAK_ERRORS:
        return None
    except BackendCompilerFailed as failed:
        raise_own_error(failed)
        raise
    raise CaptureError(
        f"{type(module).__name__}'s forward ran without being captured: TorchDynamo is switched "
        "off (TORCHDYNAMO_DISABLE or a force_eager stance), or the forward does no tensor work"
    )


def _stop(*_: Any) -> NoReturn:
    raise _Stop
