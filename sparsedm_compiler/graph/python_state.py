"""The mutable Python objects behind a model, so that a run of it can be undone."""

from __future__ import annotations

import copyreg
import functools
import random
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .capture import OwnForward
from .closures import list_closure

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_SKIPPED = (str, bytes, int, float, complex, type, types.ModuleType, types.BuiltinFunctionType)
_OURS = __name__.rpartition(".graph.")[0] + ".compiler"
_FOREIGN = (
    *(_OURS, "torch._", "torch.fx", "torch.utils.data", "logging", "_thread", "threading"),
    *("accelerate.utils.offload", "diffusers.hooks.group_offloading"),  # weights, as large as all
)
"""Modules in whose objects no model keeps its state."""
_SHARDING = "torch.distributed"
"""Where the hooks that gather and free parameters keep theirs, some of it in freed memory.

A sharded module, whose class is made there, is a model's own.
"""


class PythonState:
    """What can be reached from some objects, as it was when this was made.

    Attributes of objects, dicts, lists, sets, closures, tensors other than parameters, and the
    states of random generators are remembered. Parameters are not, nor what global variables hold.
    """

    def __init__(self, *roots: Any) -> None:
        self._objects: list[tuple[Any, Any]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._slots: list[tuple[Any, str, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._torch = torch.get_rng_state()
        self._cuda = _read_cuda_states()
        self._random = random.getstate()
        self._numpy = np.random.get_state()
        seen: dict[int, Any] = {}
        pending = list(roots)
        while pending:
            value = pending.pop()
            if value is not None and id(value) not in seen and not isinstance(value, _SKIPPED):
                seen[id(value)] = value  # held, so that no other object takes its id
                pending.extend(self._visit(value))

    def restore(self) -> None:
        """Puts everything back; what has not changed is not touched."""
        for value, before in self._objects:
            _refill(value, before)
        for cell, before in self._cells:
            if cell.cell_contents is not before:
                cell.cell_contents = before
        for value, name, before in self._slots:
            with suppress(AttributeError):  # read-only, so not changed either
                setattr(value, name, before)
        with torch.no_grad():
            for tensor, version, before in self._tensors:
                if tensor._version != version:
                    tensor.copy_(before)
        for generator, state in self._generators:
            generator.set_state(state)
        torch.set_rng_state(self._torch)
        torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._random)
        np.random.set_state(self._numpy)

    def _visit(self, value: Any) -> list[Any]:
        """Remembers one object and returns what it refers to."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_inference():
                self._tensors.append((value, value._version, value.detach().clone()))
            return []
        if isinstance(value, torch.Generator):
            self._generators.append((value, value.get_state()))
            return []
        if isinstance(value, OwnForward):
            return []
        if isinstance(value, types.FunctionType):
            return self._visit_function(value)
        if isinstance(value, types.MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, functools.partial):
            return [value.func, *value.args, *value.keywords.values()]
        if type(value) in _CONTAINERS:
            self._objects.append((value, value.copy()))
            return list(value.values() if isinstance(value, dict) else value)
        if isinstance(value, (tuple, frozenset)):
            return list(value)
        return self._visit_object(value)

    def _visit_function(self, function: types.FunctionType) -> list[Any]:
        for cell in function.__closure__ or ():
            self._cells.extend((cell, content) for content in _read(cell))
        return [*list_closure(function), *(function.__defaults__ or ()), function.__dict__]

    def _visit_object(self, value: Any) -> list[Any]:
        module = type(value).__module__
        sharding = module.startswith(_SHARDING) and not isinstance(value, nn.Module)
        if sharding or module.startswith(_FOREIGN):
            return []
        held: list[Any] = []
        if isinstance(value, dict):  # a class of its own: an output, a config
            held.extend(value.values())
        with suppress(TypeError):  # it has none
            held.append(vars(value))
        for name in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
            with suppress(AttributeError):  # not set yet
                content = getattr(value, name)
                self._slots.append((value, name, content))
                held.append(content)
        return held


def _read_cuda_states() -> list[Tensor]:
    """Returns the random state of every GPU; none if CUDA has not been used."""
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if used else []


def _read(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not filled yet
        return ()


def _refill(value: Any, before: Any) -> None:
    """Gives a container its content of before, if that has changed."""
    if isinstance(value, dict):
        same = len(value) == len(before) and all(
            key is then and value[key] is before[then]
            for key, then in zip(value, before, strict=True)
        )
    elif isinstance(value, set):
        same = value == before
    else:
        same = len(value) == len(before) and all(
            now is then for now, then in zip(value, before, strict=True)
        )
    if same:
        return
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(before)
    else:
        value.update(before)


@contextmanager
def undo_after(*roots: Any) -> Iterator[None]:
    """Undoes, at its end, what the block has done to Python objects and random states."""
    state = PythonState(*roots)
    try:
        yield
    finally:
        state.restore()
