"""Weights that are no plain floats: tensor subclasses of quantization and sparsity libraries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def explain_packed(tensor: object) -> str | None:
    """Returns why a weight cannot be masked that a library has packed or quantized, else None.

    A weight in shards (a DTensor) can.
    """
    if not is_traceable_wrapper_subclass(tensor) or _is_sharded(tensor):
        return None
    return f"its weight is packed or quantized ({type(tensor).__name__}): prune the plain one"


def take_apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state_dict in which packed tensors are the plain ones that they hold, not copied.

    Those of ``name`` are called ``name:part``, after the library's names for its parts.
    """
    return {
        part: value for name, tensor in state.items() for part, value in _list_parts(name, tensor)
    }


def fill_packed(state: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> set[str]:
    """Takes the parts of the packed tensors of ``state`` out of ``tensors`` and copies them there.

    Returns the names of the packed tensors. Raises RuntimeError where a part is missing or differs
    in shape or dtype; some may have been copied by then.
    """
    packed = {name: t for name, t in state.items() if explain_packed(t) is not None}
    for part, own in take_apart(packed).items():
        stored = tensors.pop(part, None)
        if stored is None:
            raise RuntimeError(f"it lacks {part}, of a weight that is packed or quantized here")
        if (stored.shape, stored.dtype) != (own.shape, own.dtype):
            shapes = [f"{[*tensor.shape]} in {tensor.dtype}" for tensor in (own, stored)]
            raise RuntimeError("{} is {} here, {} there".format(part, *shapes))
        with torch.no_grad():
            own.copy_(stored)
    return {*packed}


def _list_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if explain_packed(tensor) is None:
        yield name, tensor
        return
    packed: Any = tensor
    names, _ = packed.__tensor_flatten__()
    for part in names:
        yield from _list_parts(f"{name}:{part}", getattr(packed, part))


def _is_sharded(tensor: object) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def copy_for_file(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy, on the CPU: one on the tensor's own card might not fit there."""
    tensor = tensor.detach()
    if tensor.is_cpu or tensor.is_meta:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.cpu().contiguous()
