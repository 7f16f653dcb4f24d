"""Writes a new order of channels into all parameters that they occur in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .arrangement import Places
from .couplings import CoupledSet


@torch.no_grad()
def apply_order(tensors: Mapping[str, Tensor], coupled: CoupledSet, order: Places) -> None:
    """Permutes tensors in place: the channel ``order[k]`` comes to place k.

    Args:
        tensors: By name, at least one of those that the set lies in; others are left out.
        coupled: The channels.
        order: Of every place, the channel to put there.
    """
    for axis in coupled.axes:
        tensor = tensors.get(axis.parameter)
        if tensor is None:
            continue
        size = tensor.numel() if axis.dim is None else tensor.shape[axis.dim]
        index = np.arange(size)
        index[axis.indices] = axis.indices[:, order]
        wide = torch.from_numpy(index).to(tensor.device)
        if axis.dim is None:
            tensor.copy_(tensor.reshape(-1)[wide].view(tensor.shape))
        else:
            tensor.copy_(tensor.index_select(axis.dim, wide))


def invert_order(order: Places) -> Places:
    """Returns the order that undoes another."""
    return np.argsort(order)
