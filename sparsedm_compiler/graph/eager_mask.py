"""Masks in Python that no graph holds: between the graphs of a forward that breaks."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code

from ..errors import DenseRunError
from .capture import Names
from .eager_watch import EagerMode, EagerProduct, is_compiling_here, leave_to_python, name_read
from .flat_graph import classify_step
from .op_table import OP_TABLE
from .recompute import explain_recompute
from .written_parameters import SET_DATA

_MOVES = ("to", "float", "double", "half", "bfloat16", "cpu", "cuda")


class EagerMask(EagerMode):
    """A mode that replaces parameters by their masked form in every op that runs eagerly.

    ``mask``: takes a parameter, its names, and the product it is a factor of (None for a cast or
    view, which masks what it casts), and returns what to use in its place: the parameter itself
    where it stays dense. ``release``: takes a parameter that gets other values or another place.

    One mode serves many calls, in one thread: to learn the names of all parameters at each would
    cost more than a block of a small model. An op that reads nothing but plain tensors that are no
    cast or view of a parameter costs a look at its arguments.
    """

    def __init__(
        self,
        module: nn.Module,
        mask: Callable[[Tensor, Names, EagerProduct | None], Tensor],
        release: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__(module)
        self._release = release
        self._choose = leave_to_python(mask)
        self._casts: dict[int, tuple[weakref.ref[Tensor], Callable[[], Any]]] = {}
        self._depth = 0
        self._call: CodeType | None = None
        """The code of the call of the model."""
        self.for_backward = False
        """Whether the call is asked for gradients."""

    def __enter__(self) -> Any:
        if not self._depth:  # what earlier calls have cast, and parameters of other models
            self._call, self.for_backward = sys._getframe(1).f_code, torch.is_grad_enabled()
            self._casts.clear()
            if len(self._known) > len(self._own):
                self._known = dict(self._own)
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        super().__exit__(*error)

    def _refresh(self) -> None:
        super()._refresh()
        names = map(id, self._module.parameters())
        self._own = {key: self._known[key] for key in names}

    @leave_to_python
    def explain_recompute(
        self, inputs: Sequence[Any], is_pruned: Callable[..., bool]
    ) -> DenseRunError | None:
        """Returns the error for a graph called by Python that its backward runs again, or None.

        Args:
            inputs: The inputs of the graph.
            is_pruned: Whether a weight of these names and this shape is pruned.
        """
        for value in inputs:
            names = self._find_names(value) if isinstance(value, Tensor) else ()
            if names and is_pruned(names, tuple(value.shape)) and self._call is not None:
                return explain_recompute(names[0], self._call)
        return None

    @leave_to_python
    def _mask(self, weight: Tensor, names: Names, product: EagerProduct | None) -> Tensor:
        masked = self._choose(weight, names, product)
        if masked is not weight and self.for_backward and self._call is not None:
            error = explain_recompute(names[0], self._call)
            if error is not None:
                raise error
        return masked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        compiling = is_compiling_here()
        if self.written is not None and not compiling:
            self.written.note(func, args)
        if compiling or not (self._touches(args) or (kwargs and self._touches(kwargs.values()))):
            return func(*args, **(kwargs or {}))
        return self._run_masked(func, args, kwargs or {})

    def _touches(self, values: Any) -> bool:
        """Returns whether one of some arguments may be a parameter, or a cast or view of one."""
        for value in values:
            if isinstance(value, Tensor):
                key = id(value)
                if type(value) is not Tensor or key in self._known or key in self._casts:
                    return True
            elif isinstance(value, (tuple, list)) and self._touches(value):
                return True
        return False

    def _run_masked(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
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
        elif _is_moved(func):
            return func(*args, **kwargs)
        elif args and classify_step(name_read(func)) and (names := self._find_names(args[0])):
            masked_weight = self._mask(args[0], names, None)
            if masked_weight is args[0]:
                out = func(*args, **kwargs)
                self._note_step(out, names)
                return out
            out = func(masked_weight, *args[1:], **kwargs)
            self._note_cast(out, func, args, kwargs)
            return out
        elif func == SET_DATA:
            args = (args[0], self._undo_mask(args[1]))
            if self._release is not None:
                self._release(args[0])
        else:
            return self._run_other(func, args, kwargs)
        return func(*args, **kwargs)

    @leave_to_python
    def _note_cast(self, out: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes how to make a cast or view of a masked weight without its mask."""
        weight = weakref.ref(args[0])
        if isinstance(out, Tensor):
            self._casts[id(out)] = weakref.ref(out), lambda: func(weight(), *args[1:], **kwargs)

    @leave_to_python
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


def _is_moved(func: Any) -> bool:
    """Returns whether ``Module.to`` and its like move or cast a parameter, for it to stay so.

    A hook calls them (of offloading, of storage in fewer bits); no product reads what they return.
    """
    if getattr(func, "__name__", "") not in _MOVES:
        return False
    caller = sys._getframe(3)  # of __torch_function__, _run_masked and this function
    return caller.f_code.co_filename == nn.Module._apply.__code__.co_filename


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
for _method in (
    EagerMask.__torch_function__,
    EagerMask._touches,
    EagerMask._run_masked,
    EagerMask._run_other,
    _is_moved,
):
    skip_code(_method.__code__)
