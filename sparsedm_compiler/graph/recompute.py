"""Reads of weights that a backward repeats in Python, where no mask is left."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import torch.utils.checkpoint
from torch import fx
from torch.autograd.function import FunctionCtx, FunctionMeta

from ..errors import DenseRunError
from .dynamo_settings import read_compiled_frame

_CHECKPOINT = torch.utils.checkpoint.__file__
_TORCH = _CHECKPOINT.removesuffix("utils/checkpoint.py")
_masked_again: dict[int, types.CodeType] = {}  # by id: code of Dynamo's cannot always be hashed


def mask_again(method: Any) -> None:
    """Notes a function that masks what it calls, also where a backward calls it."""
    _masked_again[id(method.__code__)] = method.__code__


def list_repeated(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Returns the inputs of a graph of Dynamo's that are read outside of such functions."""
    files = {code.co_filename for code in _masked_again.values()}
    return [
        value
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
        if not all(any(file in (user.stack_trace or "") for file in files) for user in node.users)
    ]


def explain_recompute(name: str, stop: types.CodeType) -> DenseRunError | None:
    """Returns the error for a weight that is read by Python that its backward runs again, or None.

    Such Python lies outside of every graph: a graph has a backward of its own.

    Args:
        name: The weight.
        stop: The code of the call of the model: what is further out runs the whole call again.
    """
    by = _find_recompute(stop)
    if by is None:
        return None
    return DenseRunError(
        f"{name!r} would be read dense in the backward: {by} runs outside of every graph. Make "
        "that code capturable, leave the checkpointing out, or keep the weight dense with "
        f"keep_dense=[{name!r}]"
    )


def _find_recompute(stop: types.CodeType) -> str | None:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not stop and id(frame.f_code) not in _masked_again:
        if frame.f_code.co_filename == _CHECKPOINT:
            return f"torch.utils.checkpoint {_locate(frame)}"
        if function := _find_function(read_compiled_frame(frame) or frame):
            return f"the autograd.Function {function} {_locate(frame.f_back)}"
        frame = frame.f_back
    return None


def _find_function(frame: Any) -> str | None:
    """Returns the name of the autograd.Function whose forward a frame runs; None for another's."""
    code = frame.f_code
    if code.co_name != "forward":
        return None
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(first, FunctionCtx):
        return type(first).__name__.removesuffix("Backward")
    *path, _ = getattr(code, "co_qualname", "").split(".")  # since Python 3.11
    owner: Any = frame.f_globals.get(path[0]) if path else None
    for name in path[1:]:
        owner = getattr(owner, name, None)
    return owner.__name__ if isinstance(owner, FunctionMeta) else None


def _locate(frame: types.FrameType | None) -> str:
    """Returns the line that has called a frame of torch's."""
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return "" if frame is None else f"at {frame.f_code.co_filename}:{frame.f_lineno}"
