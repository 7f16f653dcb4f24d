"""A finalized weight between two calls: it gives its values back to whoever takes its ``data``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.flat_graph import may_write

_KEEPS_VALUES = ("requires_grad_", "share_memory_", "rename_", "detach_")
_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class HollowParameter(nn.Parameter):
    """A parameter that holds no values, because its packed form runs in its place.

    What edits it in place (an adapter that is merged), by its methods or through ``data``, gets the
    masked dense values: ``refill`` puts them back first. Copies and files hold ordinary parameters.
    """

    refill: Callable[[Tensor], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            first = next(iter((*args, *(kwargs or {}).values())), None)
            if isinstance(first, HollowParameter) and (func == _GET_DATA or _writes(func)):
                first.refill(first)
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        with torch._C.DisableTorchFunctionSubclass():
            copy = nn.Parameter(self.detach().clone(), self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return super().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _writes(function: Any) -> bool:
    """Returns whether a method changes the values of its tensor."""
    return may_write(function) and function.__name__ not in _KEEPS_VALUES


def make_hollow_class(refill: Callable[[Tensor], None]) -> type[HollowParameter]:
    """Returns the class of the finalized weights of one model."""
    return type("Parameter", (HollowParameter,), {"refill": staticmethod(refill)})


def hollow_out(weight: Tensor) -> None:
    """Frees the memory of a weight: it becomes one NaN, seen through strides of zero."""
    nan = torch.full((1,), torch.nan, dtype=weight.dtype, device=weight.device)
    weight.data = nan.expand(weight.shape)


def is_hollow(weight: Tensor) -> bool:
    """Returns whether a weight holds no values."""
    if not any(weight.stride()):  # seen without reading it, which on a card would wait for it
        return True
    return bool(weight.detach()[(0,) * weight.dim()].isnan())
