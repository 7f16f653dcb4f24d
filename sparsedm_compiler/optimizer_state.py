"""The tensors that an optimizer keeps for a weight, whatever number of bits they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

CODES = "codes"
"""Where a tensor of torchao keeps its 8-bit codes, beside their table "qmap"."""


def find_state(optimizer: Any, weight: Tensor) -> Mapping[str, Any]:
    """Returns what an optimizer keeps of a weight; nothing where it has not stepped it.

    ``optimizer``: one of torch's, or what wraps one (``ZeroRedundancyOptimizer``, accelerate's), or
    None.
    """
    while optimizer is not None:
        state: Mapping[str, Any] = optimizer.state.get(weight, {})
        if state:
            return state
        optimizer = getattr(optimizer, "optim", getattr(optimizer, "optimizer", None))
    return {}


def clear_where(pruned: Tensor, state: Mapping[str, Any]) -> None:
    """Sets to zero, where ``pruned`` is True, all that an optimizer keeps of a weight.

    A state in 8 bits holds codes of a table; there zero is the code of the number nearest to it.
    ``pruned``: [shape of the weight]. A paged state lies on the CPU.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != pruned.shape:
            continue
        pruned = pruned.to(value.device)
        if is_quantized(value):
            parts = dict(vars(value))
            parts[CODES].masked_fill_(pruned, find_zero(parts["qmap"]))
        elif value.dtype == torch.uint8:  # bitsandbytes: state1 with qmap1, state2 with qmap2
            value.masked_fill_(pruned, find_zero(state[name.replace("state", "qmap")]))
        else:
            value.masked_fill_(pruned, 0)


def is_quantized(value: Tensor) -> bool:
    """Returns whether a tensor is one of torchao that holds 8-bit codes."""
    return is_traceable_wrapper_subclass(value) and CODES in vars(value)


def find_zero(table: Tensor) -> int:
    """Returns the code that stands for zero in a table of numbers."""
    return int(table.abs().argmin())
