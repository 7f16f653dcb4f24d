"""Masks that pruning tools keep beside their weights: multiplied in, and their names removed.

For a weight W of a layer L, a state_dict holds, by tool:

    apex ASP                 L.W, L.__W_mma_mask and maybe L.__W_mma_pruned_p (what was pruned)
    ModelOpt                 L.W (not masked), L._W_mask
    torch.nn.utils.prune     L.W_orig, L.W_mask
    torch.ao.pruning         L.parametrizations.W.original; the mask is in the sparsifier's state
    torch.sparse, torchao    L.W as a SparseSemiStructuredTensor, without its zeros
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

from ..errors import CheckpointError
from ..masks.nm_mask import apply_mask
from ..selection.top_n import KEYS

APEX, MODELOPT, PRUNE, FAKE, SEMI = (
    *("apex ASP", "ModelOpt", "torch.nn.utils.prune", "torch.ao.pruning"),
    "torch.sparse",
)
"""The tools, as reports name them."""

_APEX = re.compile(r"(?P<layer>(?:.*\.)?)__(?P<weight>\w+)_mma_(?P<kind>mask|pruned_p)")
_MODELOPT = re.compile(r"(?P<layer>(?:.*\.)?)_(?P<weight>weight)_mask")
_PRUNE = re.compile(r"(?P<layer>(?:.*\.)?)(?P<weight>\w+)_orig")
_FAKE = re.compile(r"(?P<layer>(?:.*\.)?)parametrizations\.(?P<weight>\w+)\.original")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(slots=True)
class FoldedMasks:
    """A state_dict whose masks have been multiplied in.

    Attributes:
        tensors: By the names of the plain model.
        tools: The tool that pruned a weight, by the weight's name.
        dropped: How many non-zero values of a weight its mask set to zero, by name.
    """

    tensors: dict[str, Tensor]
    tools: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def mask(self, tool: str, name: str, stored: str, mask: Tensor) -> None:
        """Sets a weight to its masked values, which are stored under another name or its own.

        Raises CheckpointError where there is no such weight, or where the mask is none for it.
        """
        weight = self.tensors.get(stored)
        if weight is None:
            raise CheckpointError(f"there is a mask of {tool} for {name!r}, and no such weight")
        kept = _read_mask(mask, weight, tool, name)
        if weight.dtype not in KEYS:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name!r} of {tool} is {dtype}: masks are for float16 to 64")
        if stored != name and name in self.tensors:
            raise CheckpointError(f"{name!r} is there twice, the second time as {stored!r}")
        del self.tensors[stored]
        self.tensors[name] = apply_mask(weight.detach(), kept)
        self.tools[name] = tool
        self.dropped[name] = int(torch.count_nonzero(weight[~kept]))


def fold_masks(
    tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
) -> FoldedMasks:
    """Returns a state_dict whose weights are multiplied by the masks that a tool left beside them.

    ``masks``: those of ``torch.ao.pruning``, which are kept elsewhere, by the weight's name.

    Raises CheckpointError for a mask without its weight, a weight without its mask, and a mask that
    does not fit.
    """
    folded = FoldedMasks(_strip_wrapper(tensors))
    _fold_apex(folded)
    _fold_modelopt(folded)
    _fold_prune(folded)
    _fold_fake(folded, dict(masks or {}))
    _expand_semi_structured(folded)
    return folded


def _match(folded: FoldedMasks, pattern: re.Pattern[str]) -> Iterator[tuple[str, re.Match[str]]]:
    for key in [*folded.tensors]:
        if match := pattern.fullmatch(key):
            yield key, match


def _fold_apex(folded: FoldedMasks) -> None:
    for key, match in _match(folded, _APEX):
        tensor = folded.tensors.pop(key)
        name = match["layer"] + match["weight"]
        if match["kind"] == "mask":
            folded.mask(APEX, name, name, tensor)
        elif name not in folded.tensors:
            raise CheckpointError(f"there are pruned values of {APEX} for {name!r}, which is gone")


def _fold_modelopt(folded: FoldedMasks) -> None:
    for key, match in _match(folded, _MODELOPT):
        mask, name = folded.tensors.pop(key), match["layer"] + match["weight"]
        folded.mask(MODELOPT, name, name, mask)


def _fold_prune(folded: FoldedMasks) -> None:
    for key, match in _match(folded, _PRUNE):
        name = match["layer"] + match["weight"]
        mask = folded.tensors.pop(f"{name}_mask", None)
        if mask is not None:
            folded.mask(PRUNE, name, key, mask)


def _fold_fake(folded: FoldedMasks, masks: dict[str, Tensor]) -> None:
    for key, match in _match(folded, _FAKE):
        name, prefix = match["layer"] + match["weight"], key.removesuffix("original")
        mask = masks.pop(name, folded.tensors.get(f"{prefix}0.mask"))
        others = [other for other in folded.tensors if other.startswith(prefix) and other != key]
        if mask is None and others:
            continue  # of a parametrization that prunes nothing
        if mask is None:
            raise CheckpointError(
                f"{name!r} is pruned by {FAKE}, whose masks are in the sparsifier: give its "
                "state_dict() as masks=, or save the model after sparsifier.squash_mask()"
            )
        folded.tensors.pop(f"{prefix}0.mask", None)
        folded.mask(FAKE, name, key, mask)
    for name, mask in masks.items():  # of weights that are squashed already
        folded.mask(FAKE, name, name, mask)


def _expand_semi_structured(folded: FoldedMasks) -> None:
    for name, weight in [*folded.tensors.items()]:
        if isinstance(weight, SparseSemiStructuredTensor):
            folded.tensors[name] = _expand(name, weight)
            folded.tools[name], folded.dropped[name] = SEMI, 0


def _expand(name: str, weight: SparseSemiStructuredTensor) -> Tensor:
    if not isinstance(weight, SparseSemiStructuredTensorCUTLASS):
        raise CheckpointError(
            f"{name!r} is packed by cuSPARSELt, which only the GPU that packed it expands: there, "
            f"{EXPAND}, and save the state_dict again"
        )
    try:
        dense: Tensor = weight.to_dense()  # type: ignore[no-untyped-call]
        if dense.shape != weight.shape:
            raise ValueError(f"it expands to {list(dense.shape)}, not {list(weight.shape)}")
    except (RuntimeError, ValueError, AttributeError, AssertionError, TypeError) as error:
        raise CheckpointError(f"{name!r} is a damaged semi-structured weight: {error}") from error
    return dense


EXPAND = "layer.weight = nn.Parameter(layer.weight.to_dense())"
"""The line that makes a packed weight dense, where it was packed."""


def _read_mask(mask: Tensor, weight: Tensor, tool: str, name: str) -> Tensor:
    """Returns the mask as booleans. Raises CheckpointError where it does not fit the weight."""
    if mask.shape != weight.shape:
        raise CheckpointError(
            f"the mask of {tool} for {name!r} is {list(mask.shape)}, its weight "
            f"{list(weight.shape)}"
        )
    kept = mask != 0
    if not torch.equal(kept.to(mask.dtype), mask):
        raise CheckpointError(f"the mask of {tool} for {name!r} holds more than zeros and ones")
    return kept


def _strip_wrapper(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors without the prefix of DDP or torch.compile, if all names have it."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _strip_wrapper({name[len(prefix) :]: t for name, t in tensors.items()})
    return dict(tensors)
