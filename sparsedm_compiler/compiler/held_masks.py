"""Masks that are computed from time to time, and soft thresholds, in the place of frozen masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..masks.held_mask import hold_mask_op, require_soft, soft_threshold_op
from ..passes import PlannedWeight
from ..patterns import Pattern
from .frozen_masks import FrozenMasks


class HeldMasks(FrozenMasks):
    """Masks that stay until they are written anew, with a straight-through gradient.

    Compiled graphs read the tensors where they lie, so that new masks need no new graph.
    """

    frozen_names = ()

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__(masks)
        self._elsewhere: dict[tuple[str, torch.device], Tensor] = {}

    def get(self, name: str, device: torch.device) -> Tensor | None:
        """Returns the mask of a weight on a device; None for a weight that has none.

        Each device that was asked for keeps its own, which graphs made there read.
        """
        mask = self._masks.get(name)
        if mask is None or mask.device == device or device.type == "meta":
            return mask
        if (name, device) not in self._elsewhere:
            self._elsewhere[name, device] = mask.to(device)
        return self._elsewhere[name, device]

    def plan(self, row: PlannedWeight, device: torch.device) -> PlannedWeight:
        """Returns the plan of a weight, with its held mask."""
        return replace(row, held=self.get(row.name, device))

    def mask_weight(self, weight: Tensor, name: str, pattern: Pattern) -> Tensor:
        """Returns a weight as training reads it: by its held mask, or masked anew."""
        mask = self.get(name, weight.device)
        if mask is None:
            return super().mask_weight(weight, name, pattern)
        masked: Tensor = hold_mask_op(weight, mask)
        return masked

    def find_mask(self, name: str, device: torch.device) -> Tensor | None:
        """Returns a copy of the held mask of a weight, None where it has none."""
        mask = self.get(name, device)
        return None if mask is None else mask.clone()

    def write(self, masks: Mapping[str, Tensor]) -> None:
        """Replaces the values of all masks."""
        for name, mask in masks.items():
            self._masks[name].copy_(mask)
        for (name, _), copy in self._elsewhere.items():
            if name in masks:
                copy.copy_(masks[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldMasks:
        return HeldMasks({name: mask.clone() for name, mask in self._masks.items()})


class SoftMasks(FrozenMasks):
    """The fixed scales of S-STE's soft thresholds, by weight name, with the weights' patterns."""

    frozen_names = ()

    def __init__(self, scales: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> None:
        super().__init__(scales)
        self.patterns = dict(patterns)

    def plan(self, row: PlannedWeight, device: torch.device) -> PlannedWeight:
        """Returns the plan of a weight, with the scale of its soft threshold."""
        scale = self.get(row.name, device)
        return row if scale is None else replace(row, held=scale, soft=True)

    def settle(self, weight: Tensor, name: str) -> Tensor | None:
        """Returns a weight as calls read it; None where it has no soft threshold."""
        scale = self.get(name, weight.device)
        if scale is None:
            return None
        soft: Tensor = soft_threshold_op(weight.detach(), scale, str(self.patterns[name]))
        return soft

    def mask_weight(self, weight: Tensor, name: str, pattern: Pattern) -> Tensor:
        """Returns a weight as training reads it: softly thresholded, or masked anew."""
        scale = self.get(name, weight.device)
        if scale is None:
            return super().mask_weight(weight, name, pattern)
        soft: Tensor = soft_threshold_op(weight, scale, str(pattern))
        return soft

    def find_mask(self, name: str, device: torch.device) -> Tensor | None:
        """Returns None: the mask is that of the magnitudes."""
        return None

    @property
    def scales(self) -> dict[str, float]:
        """The scales as plain numbers."""
        return {name: float(scale) for name, scale in self._masks.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftMasks:
        return SoftMasks(self._masks, self.patterns)


def read_soft(
    scales: Mapping[str, float], patterns: Mapping[str, Pattern | None]
) -> FrozenMasks | None:
    """Returns the soft thresholds of a file; None where it has none.

    Raises KeyError, TypeError or ValueError where they fit no weight.
    """
    if not scales:
        return None
    chosen = {name: torch.tensor([float(scale)], device="cpu") for name, scale in scales.items()}
    kinds = {name: pattern for name in chosen if (pattern := patterns[name]) is not None}
    if kinds.keys() != chosen.keys():
        raise TypeError("a soft threshold has no pattern")
    for pattern in kinds.values():
        require_soft(pattern)
    return SoftMasks(chosen, kinds)
