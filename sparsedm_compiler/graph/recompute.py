"""Reads of weights that a backward repeats in Python, where no mask is left."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx

from ..errors import DenseRunError

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
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
        if frame.f_code is _APPLY:
            return f"the autograd.Function {frame.f_locals['cls'].__name__} {_locate(frame)}"
        frame = frame.f_back
    return None


def _locate(frame: types.FrameType | None) -> str:
    """Returns the line that has called a frame of torch's."""
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return "" if frame is None else f"at {frame.f_code.co_filename}:{frame.f_lineno}"
