"""``FrozenMasks``: the masks of a model's weights that are not computed anew, by weight name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.capture import map_parameter_names
from ..graph.names import strip_adapter_prefix
from ..masks.mask_ste import mask_ste
from ..masks.nm_mask import apply_mask, compute_mask
from ..passes import PlannedWeight
from ..patterns import Pattern
from ..reports import Decision

_BITS = ".sparsedm_mask"


class FrozenMasks:
    """Masks that stay what they are: {weight name: bool tensor of the weight's shape}.

    Copies of a model share the tensors, which nobody writes to. They follow their weights to
    another device when a graph is compiled for it.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._masks = dict(masks or {})

    def __len__(self) -> int:
        return len(self._masks)

    def __contains__(self, name: str) -> bool:
        return name in self._masks

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def get(self, name: str, device: torch.device) -> Tensor | None:
        """Returns the mask of a weight on a device; None for a weight whose mask is not frozen."""
        mask = self._masks.get(name)
        if mask is not None and mask.device != device and device.type != "meta":
            mask = self._masks[name] = mask.to(device)
        return mask

    def equals(self, other: FrozenMasks) -> bool:
        """Returns whether both hold the same masks of the same weights."""
        if self._masks.keys() != other._masks.keys():
            return False
        pairs = ((mask, other.get(name, mask.device)) for name, mask in self._masks.items())
        return all(theirs is not None and torch.equal(ours, theirs) for ours, theirs in pairs)

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The weights whose pruned values are zero for good."""
        return tuple(self._masks)

    @property
    def are_temporary(self) -> bool:
        """Whether these are masks or thresholds that freezing puts an end to."""
        return len(self) > 0 and not self.frozen_names

    def find_mask(self, name: str, device: torch.device) -> Tensor | None:
        """Returns the mask of a weight where that is not computed anew."""
        return self.get(name, device)

    def plan(self, row: PlannedWeight, device: torch.device) -> PlannedWeight:
        """Returns the plan of a weight, with its mask where that is not computed anew."""
        return replace(row, frozen=self.get(row.name, device))

    def settle(self, weight: Tensor, name: str) -> Tensor | None:
        """Returns a weight as calls read it; None where its mask is computed anew."""
        mask = self.get(name, weight.device)
        return None if mask is None else apply_mask(weight, mask)

    def mask_weight(self, weight: Tensor, name: str, pattern: Pattern) -> Tensor:
        """Returns a weight as training reads it: masked, by its frozen mask or anew."""
        mask = self.get(name, weight.device)
        return mask_ste(weight, pattern) if mask is None else torch.where(mask, weight, 0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenMasks:
        return FrozenMasks(self._masks)


def mask_frozen(module: nn.Module, frozen: FrozenMasks, state: dict[str, Any]) -> None:
    """Replaces the weights of a module's state_dict whose masks are frozen by the masked ones."""
    for names in map_parameter_names(module).values() if frozen else ():
        weight = module.get_parameter(names[0])
        masked = frozen.settle(weight, strip_adapter_prefix(names[0]))
        if masked is not None:
            state.update({name: masked for name in names if name in state})


@torch.no_grad()
def write_frozen_masks(module: nn.Module, frozen: FrozenMasks) -> None:
    """Sets to zero what frozen masks prune, so that masks computed anew are the same."""
    state: dict[str, Any] = dict(module.named_parameters())
    mask_frozen(module, frozen, state)
    for name, weight in module.named_parameters():
        if state[name] is not weight:
            weight.copy_(state[name])


def write_frozen(
    frozen: FrozenMasks, decisions: Mapping[str, Decision], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the tensors of a file that hold masks: of weights that do not tell them by zeros.

    That takes a kept weight that is zero itself. ``tensors``: the masked weights.
    """
    held, weights = {}, _rename(tensors)
    for name in frozen:
        weight = weights[name]
        mask, pattern = frozen.get(name, weight.device), decisions[name].pattern
        assert mask is not None
        assert pattern is not None
        if not torch.equal(compute_mask(weight, pattern), mask):
            held[name + _BITS] = _pack_bits(mask)
    return held


def read_frozen(
    names: Iterable[str], decisions: Mapping[str, Decision], tensors: dict[str, Tensor]
) -> FrozenMasks:
    """Returns the frozen masks of a file, and takes what ``write_frozen`` gave out of ``tensors``.

    Raises KeyError or TypeError where the file does not hold what it names.
    """
    masks, weights = {}, _rename(tensors)
    for name in names:
        weight, pattern = weights[name], decisions[name].pattern
        bits = tensors.pop(name + _BITS, None)
        if pattern is None:
            raise TypeError(f"{name} has a frozen mask and no pattern")
        if bits is None:
            if not weight.is_meta:  # else on a disk: its zeros give the mask at every call
                masks[name] = compute_mask(weight, pattern)
        else:
            masks[name] = _unpack_bits(bits, tuple(weight.shape))
    return FrozenMasks(masks)


def _rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors by the names that decisions use."""
    return {strip_adapter_prefix(name): tensor for name, tensor in tensors.items()}


def _pack_bits(mask: Tensor) -> Tensor:
    """Returns a mask as uint8 [weights / 8], the first weight in the lowest bit."""
    bits = torch.nn.functional.pad(mask.flatten().byte(), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1).byte()


def _unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the mask of ``_pack_bits``. Raises TypeError for bits of another size."""
    if packed.dtype is not torch.uint8 or packed.shape != (-(-prod(shape) // 8),):
        raise TypeError(f"{tuple(packed.shape)} of {packed.dtype} are no bits of a mask {shape}")
    bits = packed.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[: prod(shape)].view(shape).bool()
