"""Parameters that have been set to their masked values, and not been written to since."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor, nn

from ..graph.names import strip_adapter_prefix
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
        pruned = {name for name, decision in decisions.items() if decision.accepted}
        named = {strip_adapter_prefix(name): p for name, p in module.named_parameters()}
        return bool(pruned) and all(name in named and self._holds(named[name]) for name in pruned)

    def _holds(self, weight: Tensor) -> bool:
        reference, version = self._versions.get(id(weight), (None, 0))
        return reference is not None and reference() is weight and weight._version == version
