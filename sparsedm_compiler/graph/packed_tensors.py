"""Weights that are no plain floats: tensor subclasses of quantization and sparsity libraries."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def explain_packed(tensor: object) -> str | None:
    """Returns why a weight cannot be masked that a library has packed or quantized, else None.

    A weight in shards (a DTensor) can.
    """
    if not is_traceable_wrapper_subclass(tensor) or _is_sharded(tensor):
        return None
    return f"its weight is packed or quantized ({type(tensor).__name__}): prune the plain one"


def _is_sharded(tensor: object) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
