"""Public methods other than forward (``encode``, ``decode``), which run masked as forward does."""

from __future__ import annotations

import inspect
import types
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.capture import KEY, Names
from ..graph.closures import list_closure
from ..graph.eager_mask import EagerMask
from ..graph.eager_watch import EagerProduct
from ..graph.python_state import PythonState
from ..graph.recompute import mask_again
from ..graph.recorded_run import RecordingStopped, RunRecorder
from ..graph.written_parameters import WrittenParameters
from .entry_point import EntryPoint
from .masked_model import MaskedModel
from .read_guard import ReadGuard

_Steps = Generator[Any, Any, Any]
_REPEATS = 4
"""A method that multiplies by one weight more often than this is a loop, not to be unrolled."""


class _ReadsWeights(BaseException):
    """Ends the trial of a method that multiplies by a pruned weight."""


class _Loops(BaseException):
    """Ends the trial of a method that is a loop, or that calls forward."""


class SparseMethod:
    """A public method of a compiled module.

    A call that multiplies by no pruned weight is left alone. At the first that does, the method is
    captured as forward is; but one that loops (a sampler), or that calls forward besides, runs in
    Python with its weights masked op by op.
    """

    __slots__ = (
        "__name__",
        "__signature__",
        "__weakref__",
        "_entry",
        "captured",
        "guard",
        "module",
        "name",
        "override",
    )

    def __init__(
        self, module: nn.Module, name: str, override: Callable[..., Any] | None = None
    ) -> None:
        self.module = module
        self.name = name
        self.override = override
        self.guard: ReadGuard | None = None
        self.captured: bool | None = None
        self._entry: EntryPoint | None = None
        self.__name__ = name
        method = override or types.MethodType(getattr(type(module), name), module)
        self.__signature__ = inspect.signature(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and self.guard is not None and self.guard.active:
            return self._call_own(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _call_own(self, *args: Any, **kwargs: Any) -> Any:
        if self.override is not None:
            return self.override(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    @property
    def entry(self) -> EntryPoint:
        """The method as it is captured."""
        if self._entry is None:
            self._entry = EntryPoint(self.module.__dict__[KEY], self.name, self.override)
        return self._entry

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="a sparsedm model compiles itself; leave out fullgraph=True"
    )
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        forward: MaskedModel | None = self.module.__dict__.get(KEY)
        if forward is None or forward.guard.is_running:  # called by what runs masked already
            return self._call_own(*args, **kwargs)
        forward.prepare()
        if self.captured is None:
            forward.require_weights()
            with forward.guard:
                try:
                    out = self._try_plainly(forward, args, kwargs)
                except _ReadsWeights:
                    pass
                else:
                    if not isinstance(out, types.GeneratorType):
                        return out
                self.captured = self._decide(forward, args, kwargs)
        if self.captured:
            return forward.run(self.entry, *args, **kwargs)
        with forward.guard:
            out = self.entry.run_eagerly(*args, **kwargs)
        return self._generate(out) if isinstance(out, types.GeneratorType) else out

    def _generate(self, steps: _Steps) -> _Steps:
        """Yields what the generator of a method yields; its steps run masked, one by one."""
        forward: MaskedModel = self.module.__dict__[KEY]
        resume: Callable[[Any], Any] = steps.send
        value: Any = None
        while True:
            try:
                with forward.guard:
                    value = self.entry.resume(resume, value)
            except StopIteration as end:
                return end.value
            try:
                resume, value = steps.send, (yield value)
            except BaseException as error:  # thrown in, or closed
                resume, value = steps.throw, error

    def _try_plainly(
        self, forward: MaskedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls the method. Raises _ReadsWeights, undone, before a product by a pruned weight."""

        def stop(weight: Tensor, names: Names, product: EagerProduct | None) -> Tensor:
            if product is not None and forward.is_pruned(names, tuple(weight.shape)):
                raise _ReadsWeights
            return weight

        before, written = PythonState(self.module, args, kwargs), WrittenParameters(self.module)
        mode = EagerMask(self.module, stop)
        mode.written = written
        try:
            with mode:
                return self._call_own(*args, **kwargs)
        except _ReadsWeights:
            written.restore()
            before.restore()
            raise

    def _decide(self, forward: MaskedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Returns whether the method can be one graph; if not, decides on its weights."""
        uses: Counter[str] = Counter()

        def count(names: Names) -> None:
            uses[names[0]] += 1
            if uses[names[0]] > _REPEATS:
                raise _Loops

        recorder = RunRecorder(self.module, count)
        try:
            with forward.calls.refuse(_Loops):
                out = self.entry.record(recorder, args, kwargs)
        except (_Loops, RecordingStopped):
            pass  # Dynamo would unroll the one, and run the other in pieces
        else:
            if not isinstance(out, types.GeneratorType):
                return True
        forward.decide_eagerly(recorder.finish())
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseMethod, (self.module, self.name, self.override)


mask_again(SparseMethod.__call__)


def list_methods(module: nn.Module) -> list[SparseMethod]:
    """Returns the public methods of a module, other than forward, that run masked."""
    return [value for value in module.__dict__.values() if isinstance(value, SparseMethod)]


def install_methods(module: nn.Module) -> None:
    """Puts a SparseMethod in the place of every public method that reaches a layer."""
    for name in find_methods(module):
        before = module.__dict__.get(name)
        override = before.override if isinstance(before, SparseMethod) else before
        module.__dict__[name] = SparseMethod(module, name, override)


def find_methods(module: nn.Module) -> list[str]:
    """Returns the public methods, other than nn.Module's, whose code names a child or a weight.

    The code of the methods that they call is looked through, too, and of what decorators wrap.
    """
    children = {name for name, child in module.named_children() if [*child.parameters()]}
    children |= {
        name for name, own in module._parameters.items() if own is not None and own.dim() > 1
    }
    return [
        name
        for name in dir(type(module))
        if not name.startswith("_")
        and name not in dir(nn.Module)
        and any(children & names for names in _iterate_names(type(module), name, set()))
    ]


def _iterate_names(cls: type, name: str, seen: set[str]) -> Iterator[set[str]]:
    """Yields the names in the code of a method and of the methods that it calls."""
    method = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    if name in seen or not isinstance(method, types.FunctionType):
        return
    seen.add(name)
    pending: list[Any] = [method]
    while pending:
        function = pending.pop()
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes.extend(part for part in code.co_consts if isinstance(part, types.CodeType))
            yield set(code.co_names)
            for other in code.co_names:
                yield from _iterate_names(cls, other, seen)
        pending.extend(f for f in list_closure(function) if isinstance(f, types.FunctionType))
