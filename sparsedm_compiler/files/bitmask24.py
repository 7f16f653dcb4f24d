"""Weights of compressed-tensors up to 0.14: sparse-24-bitmask and sparse-bitmask, to be read only.

Of a layer X there are X.compressed (the non-zero values, row by row), X.bitmask (uint8
[out, in / 8 rounded up], a bit per weight, the lowest bit first) and X.shape ([out, in]);
sparse-bitmask has X.row_offsets, too, which says nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError

_PARTS = (".compressed", ".bitmask", ".shape")


def expand_bitmasks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with every compressed layer X as X.weight, zeros in their places.

    Raises CheckpointError where the parts of a layer do not fit each other.
    """
    layers = [
        name.removesuffix(".bitmask")
        for name in tensors
        if name.endswith(".bitmask")
        and all(name.removesuffix(".bitmask") + part in tensors for part in _PARTS)
    ]
    plain = dict(tensors)
    for layer in layers:
        values, mask, shape = (plain.pop(layer + part) for part in _PARTS)
        plain.pop(layer + ".row_offsets", None)
        plain[f"{layer}.weight"] = _expand(layer, values, mask, shape)
    return plain


def _expand(layer: str, values: Tensor, mask: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.flatten().tolist() if not shape.is_floating_point() else []
    if len(sizes) != 2 or mask.dtype != torch.uint8 or mask.dim() != 2 or min(sizes) < 1:
        raise CheckpointError(f"{layer!r} is no bitmask layer: its shape is {sizes}")
    rows, width = sizes
    if tuple(mask.shape) != (rows, -(-width // 8)):
        raise CheckpointError(
            f"{layer!r} is damaged: a bitmask of {list(mask.shape)} for {rows} by {width} weights"
        )
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(2) >> places & 1).bool().flatten(1)
    kept = bits[:, :width]
    if bits[:, width:].any() or int(kept.sum()) != values.numel():
        raise CheckpointError(
            f"{layer!r} is damaged: {values.numel()} values for {int(kept.sum())} bits"
        )
    weight = torch.zeros(rows, width, dtype=values.dtype, device=values.device)
    weight[kept] = values.flatten()
    return weight
