"""Products that run eagerly: those that a graph break leaves outside of every captured graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch._guards import CompileContext
from torch.overrides import TorchFunctionMode

from .capture import Names, map_parameter_names
from .flat_graph import classify_step
from .nested_compile import NESTED
from .op_entry import OpEntry
from .op_table import OP_TABLE
from .python_state import undo_after
from .written_parameters import WrittenParameters

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


def leave_to_python(function: Run) -> Run:
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

    written: WrittenParameters | None = None
    """What its run has written to parameters, where it is to be undone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._known: dict[int, tuple[Reference, Names]] = {}
        self._refresh()

    def __enter__(self) -> Any:
        NESTED.depth += 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        NESTED.depth -= 1

    def _refresh(self) -> None:
        names = map_parameter_names(self._module)
        for parameter in self._module.parameters():
            self._note(parameter, names[id(parameter)])

    def _note(self, tensor: Tensor, names: Names) -> None:
        self._known[id(tensor)] = refer_to(tensor), names

    @leave_to_python
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

    @leave_to_python
    def _note_step(self, out: Any, names: Names) -> None:
        """Gives a cast or view of a parameter the names of that parameter."""
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor):
                self._note(part, names)

    @leave_to_python
    def _bind(self, entry: OpEntry, args: Any, kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Returns the arguments of an op by name, and the names of those that are parameters."""
        values = entry.bind(args, kwargs)
        named = {
            k: self._find_names(v, multiplied=True)
            for k, v in values.items()
            if isinstance(v, Tensor)
        }
        return values, {k: names for k, names in named.items() if names}


Reference = Callable[[], Tensor | None]


def refer_to(tensor: Tensor) -> Reference:
    """Returns what gives a tensor as long as it lives: a weak reference, but to a subclass.

    Torch moves a parameter of a subclass (quantized weights) by swapping it with another one, and
    refuses that for a tensor with weak references.
    """
    plain = type(tensor) in (Tensor, nn.Parameter)
    return weakref.ref(tensor) if plain else lambda: tensor


def is_compiling_here() -> bool:
    """Returns whether TorchDynamo traces this call, or compiles in this thread.

    ``torch.compiler.is_compiling()`` is true in every thread while one of them compiles.
    """
    return torch.compiler.is_dynamo_compiling() or CompileContext.try_get() is not None


def name_read(function: Any) -> Any:
    """Returns the name of the attribute that a function reads, ``T`` of ``w.T``; else itself."""
    return function.__self__.__name__ if function.__name__ == "__get__" else function


class leave_eager_modes:  # noqa: N801
    """Takes the modes of this module off the top of torch's stack while the block runs."""

    __slots__ = ("_depth", "_modes")

    def __enter__(self) -> None:
        self._depth, NESTED.depth = NESTED.depth, 0
        self._modes: list[EagerMode] = []
        while depth := torch._C._len_torch_function_stack():
            if not isinstance(torch._C._get_function_stack_at(depth - 1), EagerMode):
                break
            self._modes.append(torch._C._pop_torch_function_stack())

    def __exit__(self, *_: object) -> None:
        for mode in reversed(self._modes):
            torch._C._push_on_torch_function_stack(mode)
        NESTED.depth = self._depth


class EagerWatch(EagerMode):
    """A mode that reports every op of the table that runs eagerly while it is on."""

    def __init__(self, module: nn.Module, report: Callable[[EagerProduct], None]) -> None:
        super().__init__(module)
        self._report = report
        self._kept: list[Any] = []  # casts and views: alive, so that products by them are named

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_compiling_here():
            return out
        entry = OP_TABLE.get(func)
        if entry is not None:
            values, names = self._bind(entry, args, kwargs or {})
            self._report(EagerProduct(entry, values, out, names))
        elif args and classify_step(name_read(func)) and (names := self._find_names(args[0])):
            self._kept.append(out)
            self._note_step(out, names)
        return out


# Dynamo may inline a mode into a graph it captures, but must not make a graph of the mode itself.
skip_code(EagerWatch.__torch_function__.__code__)
skip_code(is_compiling_here.__code__)


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

    The run leaves no trace: random states, Python objects and written parameters are put back. Of
    gradients it makes none, where its mode ends it before a backward.
    """
    run: Any = torch._dynamo.disable(method)  # type: ignore[no-untyped-call]
    try:
        with undo_after(module, args, kwargs), torch.no_grad(), mode:
            return run(module, *args, **kwargs)
    finally:
        if mode.written is not None:
            mode.written.restore()
