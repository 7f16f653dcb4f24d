"""TorchDynamo's settings, under which a graph is masked or its capture raises."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizeContext
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.types import GuardFilterEntry

from .nested_compile import OURS

RECOMPILE_LIMIT = 4096
"""Graphs one model may have: shapes, dtypes, train/eval, autocast. Beyond it a call raises."""

SETTINGS = {
    "recompile_limit": RECOMPILE_LIMIT,
    "accumulated_recompile_limit": RECOMPILE_LIMIT,
    "fail_on_recompile_limit_hit": True,
    "suppress_errors": False,
    "optimize_ddp": False,  # its splits hide the parameters behind FakeTensors
    "skip_nnmodule_hook_guards": False,  # hooks added after the first call must be seen
    "allow_unspec_int_on_nn_module": True,  # a counter of calls would be a new graph at each
    # On in torch 2.11 alone: there a graph goes on for a module of which the class was exchanged.
    "use_recursive_dict_tags_for_guards": False,
}


def compile_method(
    method: Callable[..., Any],
    backend: Callable[..., Any],
    *,
    fullgraph: bool,
    guard_hooks: bool = True,
) -> Callable[..., Any]:
    """Returns a function compiled by TorchDynamo: ``torch.compile`` under our settings.

    Dynamo reads them while it makes a graph. To set them around every call would cost more than
    the call of a small model.

    Args:
        method: The function.
        backend: What compiles its graphs.
        fullgraph: Whether a second graph is an error.
        guard_hooks: Whether graphs hold only while modules without hooks get none.
    """
    context: Any = torch._dynamo.optimize(
        backend, nopython=fullgraph, guard_filter_fn=_filter_guards
    )
    if isinstance(context, OptimizeContext):  # else Dynamo is switched off
        settings = {**SETTINGS, "skip_nnmodule_hook_guards": not guard_hooks}
        context.callback = _apply_settings(settings, context.callback)
    compiled: Callable[..., Any] = context(method)
    return compiled


def _filter_guards(guards: Sequence[GuardFilterEntry]) -> list[bool]:
    """Returns which guards of a graph to keep: without gradients nothing is saved for backward.

    That guard runs in Python, for every graph that a call looks at until one fits.
    """
    keeps_hooks = torch.is_grad_enabled()
    return [keeps_hooks or guard.guard_type != _SAVED_HOOKS for guard in guards]


_SAVED_HOOKS = GuardBuilder.AUTOGRAD_SAVED_TENSORS_HOOKS.__name__


def _apply_settings(settings: dict[str, Any], convert_frame: Any) -> Callable[..., Any]:
    """Returns Dynamo's callback for a frame that no graph fits yet, run under some settings."""

    @functools.wraps(convert_frame)  # its attributes, too, by which Dynamo finds the backend
    def convert(*args: Any, **kwargs: Any) -> Any:
        return _convert(settings, convert_frame, *args, **kwargs)

    setattr(convert, OURS, True)
    return convert


def _convert(settings: dict[str, Any], convert_frame: Any, *args: Any, **kwargs: Any) -> Any:
    # The lock of all compilations: in torch 2.11 the settings are those of all threads.
    with compile_lock, torch._dynamo.config.patch(settings):
        return convert_frame(*args, **kwargs)


def read_compiled_frame(frame: FrameType) -> Any:
    """Returns the frame that Dynamo compiles while ``frame`` runs our callback, else None.

    The compiled frame is no part of the stack yet.
    """
    return frame.f_locals["args"][0] if frame.f_code is _convert.__code__ else None
