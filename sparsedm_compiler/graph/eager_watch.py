"""Products that run eagerly: those that a graph break leaves outside of every captured graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.overrides import TorchFunctionMode

from .capture import Names, map_parameter_names
from .flat_graph import classify_step
from .op_table import OP_TABLE, OpEntry
from .python_state import undo_after

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


Run = TypeVar("Run", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class EagerProduct:
    """One call of an op of the table in an eager run.

    Attributes:
        entry: The op's entry in the table.
        values: The arguments by name.
        out: The result; None where it is not computed yet.
        names: Names of those arguments that are parameters, by argument name.
    """

    entry: OpEntry
    values: Mapping[str, Any]
    out: Any
    names: Mapping[str, Names]


def _leave_to_python(function: Run) -> Run:
    """Returns a function that TorchDynamo does not compile, nor what it calls.

    Where a call breaks its graph, TorchDynamo compiles every frame of Python that the call reaches,
    a mode's too.
    """
    disabled: Run = torch._dynamo.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class EagerMode(TorchFunctionMode):
    """Base of modes that see the ops that run eagerly; ops inside compiled graphs are not seen.

    It knows the parameters of a module, also those that the call brings in (offloaded weights),
    and the casts and views of them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._known: dict[int, tuple[weakref.ref[Tensor], Names]] = {}
        self._refresh()

    def _refresh(self) -> None:
        names = map_parameter_names(self._module)
        for parameter in self._module.parameters():
            self._note(parameter, names[id(parameter)])

    def _note(self, tensor: Tensor, names: Names) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), names

    @_leave_to_python
    def _find_names(self, value: Any, *, multiplied: bool = False) -> Names:
        """Returns the names of a parameter, or of the one that a tensor is a cast or view of."""
        reference, names = self._known.get(id(value), (None, ()))
        if reference is not None and reference() is value:
            return names
        if not multiplied or not isinstance(value, nn.Parameter):
            return ()
        self._note(value, ())  # of another model, unless:
        self._refresh()
        return self._known[id(value)][1]

    @_leave_to_python
    def _note_step(self, out: Any, names: Names) -> None:
        """Gives a cast or view of a parameter the names of that parameter."""
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor):
                self._note(part, names)

    @_leave_to_python
    def _bind(self, entry: OpEntry, args: Any, kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Returns the arguments of an op by name, and the names of those that are parameters."""
        values = entry.bind(args, kwargs)
        named = {
            k: self._find_names(v, multiplied=True)
            for k, v in values.items()
            if isinstance(v, Tensor)
        }
        return values, {k: names for k, names in named.items() if names}


def name_read(function: Any) -> Any:
    """Returns the name of the attribute that a function reads, ``T`` of ``w.T``; else itself."""
    return function.__self__.__name__ if function.__name__ == "__get__" else function


def leave_eager_modes() -> AbstractContextManager[None]:
    """Takes the modes of this module off the top of torch's stack while the block runs."""
    return _leave_modes() if torch._C._len_torch_function_stack() else _NO_MODES


_NO_MODES = nullcontext()


@contextmanager
def _leave_modes() -> Iterator[None]:
    modes: list[EagerMode] = []
    while depth := torch._C._len_torch_function_stack():
        if not isinstance(torch._C._get_function_stack_at(depth - 1), EagerMode):
            break
        modes.append(torch.overrides._pop_mode())  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch.overrides._push_mode(mode)  # type: ignore[no-untyped-call]


class EagerWatch(EagerMode):
    """A mode that reports every op of the table that runs eagerly while it is on."""

    def __init__(self, module: nn.Module, report: Callable[[EagerProduct], None]) -> None:
        super().__init__(module)
        self._report = report
        self._kept: list[Any] = []  # casts and views: alive, so that products by them are named

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            return out
        entry = OP_TABLE.get(func)
        if entry is not None:
            values, names = self._bind(entry, args, kwargs or {})
            self._report(EagerProduct(entry, values, out, names))
        elif args and classify_step(name_read(func)) and (names := self._find_names(args[0])):
            self._kept.append(out)
            self._note_step(out, names)
        return out


class EagerMask(EagerMode):
    """A mode that replaces parameters by their masked form in every op that runs eagerly.

    ``mask``: takes a parameter, its names, and the product it is a factor of (None for a cast or
    view, which masks what it casts), and returns what to use in its place: the parameter itself
    where it stays dense.
    """

    def __init__(
        self, module: nn.Module, mask: Callable[[Tensor, Names, EagerProduct | None], Tensor]
    ) -> None:
        super().__init__(module)
        self._mask = _leave_to_python(mask)
        self._casts: dict[int, tuple[weakref.ref[Tensor], Callable[[], Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        entry = OP_TABLE.get(func)
        if entry is not None:
            values, named = self._bind(entry, args, kwargs)
            if not named:
                return func(*args, **kwargs)
            product = EagerProduct(entry, values, None, named)
            masked = {
                id(values[key]): self._mask(values[key], names, product)
                for key, names in named.items()
            }
            args = tuple(masked.get(id(value), value) for value in args)
            kwargs = {key: masked.get(id(value), value) for key, value in kwargs.items()}
        elif args and classify_step(name_read(func)) and (names := self._find_names(args[0])):
            masked_weight = self._mask(args[0], names, None)
            if masked_weight is args[0]:
                out = func(*args, **kwargs)
                self._note_step(out, names)
                return out
            out = func(masked_weight, *args[1:], **kwargs)
            self._note_cast(out, func, args, kwargs)
            return out
        elif func == _SET_DATA:
            args = (args[0], self._undo_mask(args[1]))
        else:
            return self._run_other(func, args, kwargs)
        return func(*args, **kwargs)

    @_leave_to_python
    def _note_cast(self, out: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes how to make a cast or view of a masked weight without its mask."""
        weight = weakref.ref(args[0])
        if isinstance(out, Tensor):
            self._casts[id(out)] = weakref.ref(out), lambda: func(weight(), *args[1:], **kwargs)

    @_leave_to_python
    def _undo_mask(self, value: Any) -> Any:
        """Returns a value that becomes the data of a parameter, as ``Module.to`` sets it.

        The cast of a masked weight is made anew without the mask, which would stay for good.
        """
        reference, cast = self._casts.get(id(value), (None, None))
        return value if cast is None or reference() is not value else cast()  # type: ignore

    def _run_other(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an op that is no product: one that makes a tensor of a weight gets it masked."""
        out = func(*args, **kwargs)
        if func.__name__ in ("__get__", "__set__") or not isinstance(out, Tensor):
            return out
        if any(out is arg for arg in args):  # in place
            return out
        masked = {
            id(arg): self._mask(arg, names, None)
            for arg in _iterate_tensors((args, tuple(kwargs.values())))
            if (names := self._find_names(arg))
        }
        if all(key == id(weight) for key, weight in masked.items()):
            return out
        replaced, values = _replace((args, tuple(kwargs.values())), masked)
        return func(*replaced, **dict(zip(kwargs, values, strict=True)))


def _iterate_tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples and lists."""
    if isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _iterate_tensors(part)
    elif isinstance(tree, Tensor):
        yield tree


def _replace(tree: Any, by_id: Mapping[int, Tensor]) -> Any:
    """Returns nested tuples and lists with some tensors replaced."""
    if isinstance(tree, (tuple, list)):
        return [_replace(part, by_id) for part in tree]
    return by_id.get(id(tree), tree)


# Dynamo may inline a mode into a graph it captures, but must not make a graph of the mode itself.
skip_code(EagerWatch.__torch_function__.__code__)
skip_code(EagerMask.__torch_function__.__code__)
skip_code(EagerMask._run_other.__code__)


def watch_eager(
    module: nn.Module,
    method: Callable[..., Any],
    report: Callable[[EagerProduct], None],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Runs ``method(module, *args, **kwargs)`` eagerly, reports its products, and undoes it."""
    run_undone(EagerWatch(module, report), module, method, args, kwargs)


def run_undone(
    mode: EagerMode,
    module: nn.Module,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Runs ``method(module, *args, **kwargs)`` eagerly under a mode and undoes it.

    The run leaves no trace: no gradients, and random states and Python objects are put back.
    """
    run: Any = torch._dynamo.disable(method)  # type: ignore[no-untyped-call]
    with undo_after(module, args, kwargs), torch.no_grad(), mode:
        return run(module, *args, **kwargs)
