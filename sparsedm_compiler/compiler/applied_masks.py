"""Parameters that have been set to their masked values, and not been written to since."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..graph.names import strip_adapter_prefix
from ..masks.nm_mask import apply_mask, compute_mask
from ..patterns import Pattern
from ..reports import Decision


class AppliedMasks:
    """The parameters of one model that hold their masked values."""

    def __init__(self) -> None:
        self._versions: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def add(self, weight: Tensor) -> None:
        """Notes that a parameter holds its masked values now."""
        self._versions[id(weight)] = weakref.ref(weight), weight._version

    def cover(self, module: nn.Module, decisions: Mapping[str, Decision]) -> bool:
        """Returns whether weights are pruned, and all of them hold their masked values."""
        pruned = {name: d.pattern for name, d in decisions.items() if d.pattern is not None}
        named = {strip_adapter_prefix(name): p for name, p in module.named_parameters()}
        return bool(pruned) and all(
            name in named and self._holds(named[name], pattern) for name, pattern in pruned.items()
        )

    def _holds(self, weight: Tensor, pattern: Pattern) -> bool:
        reference, version = self._versions.get(id(weight), (None, 0))
        if reference is None or reference() is not weight or weight._version != version:
            return False
        values = weight.detach()  # what is written to weight.data (by an EMA) counts no version
        return torch.equal(values, apply_mask(values, compute_mask(values, pattern)))
