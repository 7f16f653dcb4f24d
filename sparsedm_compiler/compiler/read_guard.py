"""The guard against reads of pruned weights outside of the calls that mask them.

Every module that holds a pruned weight shows a forward pre-hook that raises, but while the compiled
model runs, so that TorchDynamo sees none. So a layer that runs in any other way (a forward or
method that was replaced, a block called by itself, a backward that runs a block again, a tracer's
copy of the forward) raises instead of running dense.
"""

from __future__ import annotations

import copy
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._guards import TracingContext

from ..graph.capture import Names, map_parameter_names
from .root_hook import RootHook

_dense_allowed: ContextVar[bool] = ContextVar("dense_allowed", default=False)


@contextmanager
def allow_dense() -> Iterator[None]:
    """Lets layers of compiled models be called one by one, dense, while the block runs.

    A compiled model masks its weights within its own calls. Calling one of its layers or blocks
    directly raises DenseRunError, except in this block, in which it computes with the dense
    (latent) weights. Calls of the model itself run masked here, too.

    Returns:
        A context manager, of this thread alone.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> with sdm.allow_dense():
        ...     out = student[1](torch.randn(1, 8))
    """
    token = _dense_allowed.set(True)
    try:
        yield
    finally:
        _dense_allowed.reset(token)


HOOK_ID = -1
"""The key of the guard's hook among the forward pre-hooks of a module: torch gives no such one."""

_REASON = "a layer of a sparsedm model was called outside of its calls, where it would run dense"


class Guarded(Protocol):
    """What the guard needs of a compiled model's forward."""

    guard: ReadGuard

    def refuse_outside_call(self, owner: nn.Module) -> None:
        """Raises DenseRunError for a pruned weight of ``owner``."""


class OutsideCallHook(RootHook):
    """A forward pre-hook of the modules that hold pruned weights of the compiled model ``root``."""

    @torch.compiler.disable(reason=_REASON)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, module: nn.Module, args: Any) -> None:
        forward: Guarded | None = self.forward
        if forward is not None and not _dense_allowed.get():
            forward.refuse_outside_call(module)


class GuardedHooks(OrderedDict[int, Any]):
    """The forward pre-hooks of a module that holds a pruned weight.

    It holds the hooks that others register. Outside of the calls of the compiled model it tells of
    one more, by its truth, length, items and values, which are what a call of a module reads. So no
    call has to put hooks in and out, of which TorchDynamo would check each.
    """

    def __init__(self, *guards: OutsideCallHook) -> None:
        super().__init__()
        self.guards = guards  # of more than one compiled model where they share the module

    @property
    def is_armed(self) -> bool:
        """Whether this thread runs neither the compiled model nor one that shares the module."""
        forwards = [guard.forward for guard in self.guards]
        alive = [forward for forward in forwards if forward is not None]
        return bool(alive) and not any(forward.guard.is_running for forward in alive)

    def keep_others(self, *roots: nn.Module | None) -> tuple[OutsideCallHook, ...]:
        """Returns the guard's hooks but those of some models."""
        return tuple(guard for guard in self.guards if guard.root not in roots)

    def __bool__(self) -> bool:
        return self.is_armed or super().__len__() > 0

    def __len__(self) -> int:
        if not self.is_armed:
            return super().__len__()
        if TracingContext.try_get() is not None:  # a graph break: the layer is called in Python
            raise Unsupported(_REASON)
        return super().__len__() + 1

    def items(self) -> Any:
        """Returns the items, with the guard's hook before all others."""
        return self._list_all().items()

    def values(self) -> Any:
        """Returns the hooks, with the guard's before all others."""
        return self._list_all().values()

    def _list_all(self) -> OrderedDict[int, Any]:
        hooks = OrderedDict[int, Any]()
        if self.is_armed:
            hooks[HOOK_ID] = next(guard for guard in self.guards if guard.forward is not None)
        hooks.update(super().items())
        return hooks

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedHooks:
        memo[id(self)] = hooks = GuardedHooks(*(copy.deepcopy(g, memo) for g in self.guards))
        hooks.update({key: copy.deepcopy(hook, memo) for key, hook in super().items()})
        return hooks

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(super().items())


class ReadGuard:
    """The state that the hooks of one compiled model share: whether it runs."""

    def __init__(self) -> None:
        self.active = False  # whether the model runs, in any thread
        self._depth = 0
        self._lock = threading.Lock()
        self._hook = OutsideCallHook(None)
        self._shared: list[dict[int, Any]] = []
        """Forward pre-hooks of modules that had some before: their handles know that very dict."""
        self.hollow: list[tuple[Tensor, type[nn.Parameter]]] = []
        """Finalized weights with the classes that they have between calls."""
        self._thread = threading.local()

    def watch(self, root: nn.Module, is_pruned: Callable[[Names, tuple[int, ...]], bool]) -> None:
        """Chooses the modules to watch: those that hold a parameter for which ``is_pruned``."""
        names, hook = map_parameter_names(root), OutsideCallHook(root)
        shared: list[dict[int, Any]] = []
        for module in root.modules():
            remove_hooks(module, root)
            if module is root or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue  # the forward of root is ours; embeddings do not multiply
            for parameter in module._parameters.values():
                if parameter is None or not is_pruned(names[id(parameter)], tuple(parameter.shape)):
                    continue
                _install(hook, module, shared)
                break
        with self._lock:
            self._hook, self._shared = hook, shared
            if not self._depth:
                self._arm()

    @property
    def is_running(self) -> bool:
        """Whether this thread is inside a call of the model."""
        depth: int = self._thread.__dict__.get("depth", 0)
        return depth > 0

    def __enter__(self) -> None:
        state = self._thread.__dict__
        state["depth"] = state.get("depth", 0) + 1
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self.active = True
                for hooks in self._shared:
                    hooks.pop(HOOK_ID, None)
                for weight, _ in self.hollow:
                    weight.__class__ = nn.Parameter

    def __exit__(self, *_: Any) -> None:
        self._thread.__dict__["depth"] -= 1
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self.active = False
                self._arm()

    def _arm(self) -> None:
        hook = self._hook
        for hooks in self._shared:
            hooks[HOOK_ID] = hook
        for weight, hollow_class in self.hollow:
            weight.__class__ = hollow_class


def _install(hook: OutsideCallHook, module: nn.Module, shared: list[dict[int, Any]]) -> None:
    """Lets a module show a hook; appends its hooks to ``shared`` if it has had any before."""
    hooks = module._forward_pre_hooks
    if isinstance(hooks, GuardedHooks):
        hooks.guards = (*hooks.keep_others(None, hook.root), hook)
    elif hooks:
        shared.append(hooks)
    else:
        module._forward_pre_hooks = GuardedHooks(hook)


def remove_hooks(module: nn.Module, root: nn.Module) -> None:
    """Removes the hooks of a compiled model from a module, and those of copies and files."""
    hooks = module._forward_pre_hooks
    if isinstance(hooks, GuardedHooks):
        hooks.guards = hooks.keep_others(None, root)
    for key, hook in list(hooks.items()):  # under any key, where a library has copied hooks
        if isinstance(hook, OutsideCallHook) and hook.root in (None, root):
            del hooks[key]


def describe_function(function: Any) -> str:
    """Returns the name of a function and where it was written."""
    while isinstance(function, types.MethodType):
        function = function.__func__
    if isinstance(function, types.FunctionType):
        code = function.__code__
        return f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
    return type(function).__name__
