"""The guard against reads of pruned weights outside of the calls that mask them.

Every module that holds a pruned weight has a forward pre-hook that raises. The compiled model
takes the hooks out while it runs, so that TorchDynamo sees none. So a layer that runs in any other
way (a forward or method that was replaced, a block called by itself, a backward that runs a block
again, a tracer's copy of the forward) raises instead of running dense.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..graph.capture import KEY, Names, map_parameter_names

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


class Guarded(Protocol):
    """What the guard needs of a compiled model's forward."""

    def refuse_outside_call(self, owner: nn.Module) -> None:
        """Raises DenseRunError for a pruned weight of ``owner``."""


class OutsideCallHook:
    """A forward pre-hook of a module that holds a pruned weight of the compiled model ``root``.

    A copy of the whole model guards itself. A copy of a part of it is an ordinary module.
    """

    def __init__(self, root: nn.Module | None) -> None:
        self._root = None if root is None else weakref.ref(root)

    @property
    def root(self) -> nn.Module | None:
        """The compiled model; None for a hook of a copied or unpickled part."""
        return None if self._root is None else self._root()

    def __call__(self, module: nn.Module, args: Any) -> None:
        root = self.root
        forward: Guarded | None = None if root is None else root.__dict__.get(KEY)
        if forward is not None and not _dense_allowed.get():
            forward.refuse_outside_call(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> OutsideCallHook:
        root = self.root
        return OutsideCallHook(None if root is None else memo.get(id(root)))

    def __reduce__(self) -> tuple[Any, ...]:
        return OutsideCallHook, (None,)


class ReadGuard:
    """Puts the hooks of one compiled model in, and takes them out while it runs."""

    def __init__(self) -> None:
        self.active = False  # whether the model runs, in any thread
        self._depth = 0
        self._lock = threading.Lock()
        self._key = RemovableHandle(OrderedDict()).id  # of our hook among the hooks of every module
        self._hook = OutsideCallHook(None)
        self._watched: list[dict[int, Any]] = []  # their forward pre-hooks
        self.hollow: list[tuple[Tensor, type[nn.Parameter]]] = []
        """Finalized weights with the classes that they have between calls."""
        self._thread = threading.local()

    def watch(self, root: nn.Module, is_pruned: Callable[[Names, tuple[int, ...]], bool]) -> None:
        """Chooses the modules to watch: those that hold a parameter for which ``is_pruned``."""
        names, watched = map_parameter_names(root), []
        for module in root.modules():
            remove_hooks(module, root)
            if module is root or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue  # the forward of root is ours; embeddings do not multiply
            for parameter in module._parameters.values():
                if parameter is None or not is_pruned(names[id(parameter)], tuple(parameter.shape)):
                    continue
                watched.append(module._forward_pre_hooks)
                break
        with self._lock:
            self._hook, self._watched = OutsideCallHook(root), watched
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
                key = self._key
                for hooks in self._watched:
                    hooks.pop(key, None)
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
        key, hook = self._key, self._hook
        for hooks in self._watched:
            hooks[key] = hook
        for weight, hollow_class in self.hollow:
            weight.__class__ = hollow_class


def remove_hooks(module: nn.Module, root: nn.Module) -> None:
    """Removes the hooks of a compiled model from a module, and those of copies and files."""
    hooks = module._forward_pre_hooks
    for key, hook in list(hooks.items()):
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
