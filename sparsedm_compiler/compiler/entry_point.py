"""One method of a compiled model, run through TorchDynamo so that it runs masked or raises."""

from __future__ import annotations

import threading
import types
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

from ..errors import DenseRunError
from ..graph.capture import GRAPH_BREAK_ERRORS, copy_method, raise_own_error
from ..graph.diagnostics import describe_graph_break
from ..graph.dynamo_settings import compile_method
from ..graph.eager_mask import EagerMask
from ..graph.eager_watch import run_undone
from ..graph.module_guards import HookWatch, pin_modules_without_hooks
from ..graph.recompute import list_repeated
from ..graph.recorded_run import RecordingStopped, RunRecorder
from ..graph.stateful_hooks import StatefulHooksError, isolate_stateful_hooks
from ..meta_models import require_values
from ..progress import COMPILING, announce
from .explanations import refuse_transforms
from .masked_model import MaskedModel

_NO_FRAMES = "found no compiled frames"
"""How newer torch words that a call ran uncompiled; the run counter says it for all."""

_NO_GRADIENT = "does not require grad and does not have a grad_fn"
_RECORDED_STEPS = 100
"""A generator may have no end."""

_OF_DEVICES = (torch.OutOfMemoryError, torch.AcceleratorError)


def _is_offloaded(module: nn.Module) -> bool:
    """Returns whether Accelerate gives layers their values when they run."""
    return any("_hf_hook" in layer.__dict__ for layer in module.modules())


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def _take_step(step: Callable[[Any], Any], value: Any) -> Any:
    return step(value)


_Compiled = tuple[Callable[..., Any], str | None]
"""What to call, and why it is several graphs; None where one holds it all."""


class EntryPoint:
    """One method of a compiled model."""

    def __init__(
        self, forward: MaskedModel, name: str, override: Callable[..., Any] | None
    ) -> None:
        self._forward = forward
        self._name = name
        self._override = override
        self._own: Callable[..., Any] | None = None
        self._compiled: _Compiled | None = None
        self._graphs = 0  # how many have been made
        self._repeated: DenseRunError | None = None  # what a backward of Python would run again
        self._transformed: EntryPoint | None = None
        self._masks = threading.local()
        self._deciding = threading.RLock()
        self._hooks = HookWatch(forward.module)
        self._guards_hooks = forward.config.mode == "train"  # of which one comparison is no part

    @property
    def broken(self) -> str | None:
        """Why the method runs as several graphs; None while one holds it all."""
        return None if self._compiled is None else self._compiled[1]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method. Raises DenseRunError where it would run without its masks."""
        forward = self._forward
        transformed = torch._C._functorch.maybe_current_level() is not None
        entry = self._find_transformed() if transformed else self
        before = forward.calls.runs
        try:
            out = entry._call(*args, **kwargs)
        except FailOnRecompileLimitHit as limit:
            raise DenseRunError(
                f"{self} has been compiled for more shapes and settings than it may: "
                f"pad its inputs to fewer shapes ({limit})"
            ) from limit
        except RuntimeError as error:
            if _NO_FRAMES not in str(error):
                if not isinstance(error, _OF_DEVICES) and not _is_offloaded(forward.module):
                    require_values(forward.module, "this call")
                raise_own_error(error)
                raise
        if forward.calls.runs == before and entry.broken is None:  # else the rest is masked, too
            refuse_transforms(forward.module)
            raise DenseRunError(
                f"{self} ran without its masks, so its output was dropped: TorchDynamo did "
                "not compile the call. Unset TORCHDYNAMO_DISABLE, leave the force_eager "
                "stance, and call it outside of dispatch modes such as FlopCounterMode"
            )
        return out

    def run_eagerly(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method uncompiled, with its weights masked op by op."""
        method: Any = torch._dynamo.disable(self.copy())  # type: ignore[no-untyped-call]
        module = self._forward.module
        with self._mask_eagerly():
            return method(module, *args, **kwargs)

    def resume(self, step: Callable[[Any], Any], value: Any) -> Any:
        """Takes a step (``send`` or ``throw``) of a generator that ``run_eagerly`` returned."""
        with self._mask_eagerly():
            return _take_step(step, value)

    def copy(self) -> Callable[..., Any]:
        """Returns the method as a function of (self, ...)."""
        return copy_method(self._forward.module, self._name, self._override)

    def record(self, recorder: RunRecorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the method eagerly under a recorder, undone, and returns its result.

        Of a generator the first steps are taken. Raises RecordingStopped before a backward.
        """
        method = self.copy()

        def run(*args: Any, **kwargs: Any) -> Any:
            out = method(*args, **kwargs)
            if isinstance(out, types.GeneratorType):
                deque(islice(out, _RECORDED_STEPS), maxlen=0)
            return out

        try:
            return run_undone(recorder, self._forward.module, run, args, kwargs)
        except RuntimeError as error:
            if _NO_GRADIENT in str(error):  # torch.autograd.backward, which no mode sees
                raise RecordingStopped from error
            raise

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        module = self._forward.module
        compiled, reason = self._find_compiled()
        if reason is None:
            try:
                return compiled(module, *args, **kwargs)
            except GRAPH_BREAK_ERRORS as unsupported:
                refuse_transforms(module)
                reason = describe_graph_break(unsupported)
            except BackendCompilerFailed as failed:
                if not isinstance(failed.inner_exception, StatefulHooksError):
                    raise
                reason = str(failed.inner_exception)
            compiled = self._go_partial(reason, *args, **kwargs)
        if self._repeated is not None and torch.is_grad_enabled():
            raise self._repeated.with_traceback(None)
        with self._mask_eagerly():
            return compiled(module, *args, **kwargs)

    def _find_transformed(self) -> EntryPoint:
        """Returns the same method for calls under transforms (vmap), which break its graph."""
        if self._transformed is None:
            self._transformed = EntryPoint(self._forward, self._name, self._override)
        return self._transformed

    def _find_compiled(self) -> _Compiled:
        """Returns what to call; anew at first, and where the method was patched or got hooks."""
        own = getattr(type(self._forward.module), self._name)
        hooked = not self._guards_hooks and self._hooks.sees_hooks()
        compiled = self._compiled
        if compiled is not None and own is self._own and not hooked:
            return compiled
        with self._deciding:
            compiled = self._compiled
            if compiled is None or own is not self._own or (hooked and not self._guards_hooks):
                self._own, self._repeated = own, None
                self._guards_hooks |= hooked
                compiled = self._compiled = self._compile(whole=True), None
            return compiled

    def _mask_eagerly(self) -> EagerMask:
        """Returns this thread's mode for what runs between graphs; anew after each new graph."""
        kept: tuple[int, EagerMask] | None = self._masks.__dict__.get("kept")
        if kept is None or kept[0] != self._graphs:
            forward = self._forward
            mask = EagerMask(forward.module, forward.mask_eagerly, forward.weights.release)
            kept = self._masks.kept = self._graphs, mask
        return kept[1]

    def _compile(self, *, whole: bool) -> Callable[..., Any]:
        isolate_stateful_hooks(self._forward.module)
        lower, guard_hooks = partial(self._lower, whole=whole), self._guards_hooks
        return compile_method(self.copy(), lower, fullgraph=whole, guard_hooks=guard_hooks)

    def _go_partial(self, reason: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Runs as several graphs from now on, decided by an eager run, since none holds it all."""
        with self._deciding:
            if self._compiled is None or self._compiled[1] is None:  # no other thread came first
                recorder, out = RunRecorder(self._forward.module), None
                with suppress(RecordingStopped):
                    out = self.record(recorder, args, kwargs)
                self._forward.decide_eagerly(recorder.finish(out))
                self._guards_hooks = True
                self._compiled = self._compile(whole=False), reason
            return self._compiled[0]

    @announce("compiling the model", COMPILING)
    def _lower(
        self, gm: fx.GraphModule, example_inputs: list[Any], *, whole: bool
    ) -> Callable[..., Any]:
        self._graphs += 1
        if isolate_stateful_hooks(self._forward.module) and whole:
            raise StatefulHooksError("hooks of a cache carry state from call to call")
        if not self._guards_hooks:
            pin_modules_without_hooks()
        repeated = [] if whole else list_repeated(gm, example_inputs)
        run = self._forward.lower(gm, example_inputs, whole=whole)
        if repeated and self._repeated is None:
            mask: EagerMask = self._masks.kept[1]
            self._repeated = mask.explain_recompute(repeated, self._forward.is_pruned)
            if self._repeated is not None and mask.for_backward:
                raise self._repeated
        return run

    def __str__(self) -> str:
        name = type(self._forward.module).__name__
        return name if self._name == "forward" else f"{name}.{self._name}"
