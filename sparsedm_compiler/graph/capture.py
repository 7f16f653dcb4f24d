"""Model and inputs to graphs, through TorchDynamo.

Dynamo hangs its cache on code objects, so all instances of a class share one cache and one
recompile limit, and past the limit it runs the original forward without a word. Here every
capture runs a private copy of the code object under settings that raise instead.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import (
    BackendCompilerFailed,
    UncapturedHigherOrderOpError,
    Unsupported,
    UserError,
)
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError, SparseDMError
from .flat_graph import Op, classify_step
from .op_table import OP_TABLE, OpEntry

RECOMPILE_LIMIT = 4096
"""Graphs one model may have: shapes, dtypes, train/eval, autocast. Beyond it a call raises."""

BROKEN = (Unsupported, UncapturedHigherOrderOpError, UserError)
"""What Dynamo raises for a forward that no single graph holds."""

Names = tuple[str, ...]
"""All names of one parameter in its model; more than one where weights are tied."""

_SETTINGS = {
    "recompile_limit": RECOMPILE_LIMIT,
    "accumulated_recompile_limit": RECOMPILE_LIMIT,
    "fail_on_recompile_limit_hit": True,
    "suppress_errors": False,
    "optimize_ddp": False,  # its splits hide the parameters behind FakeTensors
    "skip_nnmodule_hook_guards": False,  # hooks added after the first call must be seen
}


def dynamo_settings() -> AbstractContextManager[None]:
    """Dynamo with a private recompile limit that raises, and with guards on hooks."""
    patch: AbstractContextManager[None] = torch._dynamo.config.patch(_SETTINGS)
    return patch


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """One graph of a model.

    ``names``: parameter names of the placeholders that are parameters. ``buffers``: the
    placeholders that are buffers; every other placeholder is an input of the call.
    """

    gm: fx.GraphModule
    names: Mapping[fx.Node, Names]
    buffers: frozenset[fx.Node] = frozenset()

    def parameters(self, ops: Sequence[Op]) -> dict[Op, Names]:
        """The Ops of ``ops`` (``flatten(gm)``) that are parameters, with their names."""
        return {op: self.names[op.node] for op in ops if op.node in self.names}


class OwnForward:
    """Base of what stands in the place of a module's own forward and remembers it.

    ``override``: the forward the instance had of its own, None for the class's.
    """

    override: Callable[..., Any] | None = None


def find_own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward the instance has of its own, ours aside; None for the class's."""
    forward = module.__dict__.get("forward")
    return forward.override if isinstance(forward, OwnForward) else forward


def copy_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward as a function of (self, ...) with a code object of its own."""
    override = find_own_forward(module)
    if override is None:
        forward = type(module).forward
    elif isinstance(override, types.MethodType) and override.__self__ is module:
        forward = override.__func__
    else:
        forward = _unbound(override)
    if not isinstance(forward, types.FunctionType):
        raise CaptureError(
            f"{type(module).__name__}.forward is a {type(forward).__name__}, not a Python "
            "function, so it cannot be captured; compile the eager module it was made from"
        )
    copy = types.FunctionType(
        forward.__code__.replace(),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _unbound(bound: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    return forward


def map_parameter_names(module: nn.Module) -> dict[int, Names]:
    """id of each parameter to all its names, in the order of ``named_parameters``."""
    names: dict[int, Names] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def bind_parameters(
    gm: fx.GraphModule, example_inputs: Sequence[Any], module: nn.Module
) -> CapturedGraph:
    """``gm`` with its placeholders named after the parameters of ``module`` they stand for."""
    names, buffers = map_parameter_names(module), {id(buffer) for buffer in module.buffers()}
    found = list(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    return CapturedGraph(
        gm,
        {node: names[id(x)] for node, x in found if id(x) in names},
        frozenset(node for node, x in found if id(x) in buffers),
    )


def bind_parameters_by_source(gm: fx.GraphModule) -> CapturedGraph:
    """``gm`` with its placeholders named by where Dynamo read them: the module is unknown."""
    names: dict[fx.Node, Names] = {}
    buffers = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        source = node.meta["grapharg"].source.name if "grapharg" in node.meta else ""
        place = source if isinstance(source, str) else source()  # a method in older torch
        path = ".".join(re.findall(r"_(?:modules|parameters)'?\]?\['([^']+)'\]", place))
        if "_parameters" in place and path:
            names[node] = (path,)
        elif "_buffers" in place:
            buffers.add(node)
    return CapturedGraph(gm, names, frozenset(buffers))


@contextmanager
def unwrap_errors() -> Iterator[None]:
    """Let a SparseDMError raised inside a backend out as itself."""
    try:
        yield
    except BackendCompilerFailed as failed:
        if isinstance(failed.inner_exception, SparseDMError):
            raise failed.inner_exception from None
        raise


class _Stop(Exception):  # noqa: N818
    """Raised in the place of the first run: the graph was all we wanted."""


def capture(module: nn.Module, *args: Any, **kwargs: Any) -> CapturedGraph | None:
    """The graph of one call, which is not run; None if it takes more than one graph.

    Works on meta tensors. Raises CaptureError if the forward cannot be called that way.
    """
    found: list[CapturedGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append(bind_parameters(gm, example_inputs, module))
        return _stop

    run = torch.compile(copy_forward(module), backend=backend, fullgraph=True, dynamic=False)
    try:
        with dynamo_settings(), unwrap_errors():
            run(module, *args, **kwargs)
    except _Stop:
        return found[0]
    except BROKEN:
        return None
    raise CaptureError(
        f"{type(module).__name__}'s forward ran without being captured: TorchDynamo is switched "
        "off (TORCHDYNAMO_DISABLE or a force_eager stance), or the forward does no tensor work"
    )


def _stop(*_: Any) -> NoReturn:
    raise _Stop


@dataclass(frozen=True, slots=True)
class EagerProduct:
    """One op of the table seen in an eager run, with the parameters among its arguments."""

    entry: OpEntry
    values: Mapping[str, Any]
    out: Any
    names: Mapping[str, Names]


class EagerWatch(TorchFunctionMode):
    """Shows ``see`` every op of the table that runs eagerly while the mode is on.

    Compiled graphs run unseen: only Python that Dynamo left outside of them comes by here.
    """

    def __init__(self, module: nn.Module, see: Callable[[EagerProduct], None]) -> None:
        super().__init__()
        self.names = map_parameter_names(module)
        self.see = see
        self.kept: list[Tensor] = []  # casts and views of parameters: ids stay theirs while held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        entry = OP_TABLE.get(func)
        if entry is None:
            self._follow(func, args, out)
        else:
            values = entry.bind(args, kwargs or {})
            held = {k: v for k, v in values.items() if isinstance(v, Tensor)}
            names = {k: self.names[id(v)] for k, v in held.items() if id(v) in self.names}
            self.see(EagerProduct(entry, values, out, names))
        return out

    def _follow(self, func: Any, args: Any, out: Any) -> None:
        """A cast or view of a parameter is still that parameter."""
        names = self.names.get(id(args[0])) if args else None
        if names and classify_step(func):
            for part in out if isinstance(out, (tuple, list)) else (out,):
                self.names[id(part)] = names
                self.kept.append(part)


# Dynamo may inline the mode into a graph it captures, but must not make a graph of the mode itself.
skip_code(EagerWatch.__torch_function__.__code__)


def record_eager_products(module: nn.Module, *args: Any, **kwargs: Any) -> list[EagerProduct]:
    """The table's ops of one eager run of the module's own forward, in order.

    The run leaves no trace: no gradients, random state and buffers as they were.
    """
    seen: list[EagerProduct] = []
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    forward = copy_forward(module)
    with torch.no_grad(), torch.random.fork_rng(), EagerWatch(module, seen.append):
        torch._dynamo.disable(forward)(module, *args, **kwargs)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    return seen
