"""``CalibrationBatch``: the inputs of one call of a model, and their weight in the Hessians."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class CalibrationBatch:
    """The inputs of one call of a model.

    Attributes:
        args: Positional inputs, tensors [B, ...] among them.
        kwargs: Keyword inputs.
        weight: How much the inputs of this call count, > 0, in the Hessians of all layers: e.g.
            more for some noise levels than for others.

    Raises:
        DataError: ``weight`` is not a finite number > 0.

    Example:
        >>> CalibrationBatch((torch.zeros(2, 3),)).weight
        1.0
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise DataError(f"the weight {self.weight} of a calibration batch is not > 0")

    def to(self, device: torch.device) -> CalibrationBatch:
        """Returns the batch with its tensors on a device."""
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (self.args, dict(self.kwargs)))
        return CalibrationBatch(args, kwargs, self.weight)

    def to_model(self, model: nn.Module) -> CalibrationBatch:
        """Returns the batch with its tensors on the device of a model's first parameter."""
        return self.to(next((p.device for p in model.parameters()), torch.device("cpu")))

    def describe(self) -> str:
        """Returns the shapes of its tensors as text."""
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        shapes = [str(list(x.shape)) for x in leaves if isinstance(x, Tensor)]
        return f"inputs of shapes {', '.join(shapes)}" if shapes else "no tensors"


Batches = Iterable[CalibrationBatch | Tensor | Sequence[Any] | Mapping[str, Any]]
"""Calls of a model: each a CalibrationBatch, one tensor, positional or keyword inputs."""


def list_batches(batches: Batches) -> list[CalibrationBatch]:
    """Returns the calls that ``batches`` hold.

    Raises:
        DataError: There is none, or one is of another kind.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise DataError(
            f"calibration batches of type {type(batches).__name__} are no list of calls: give "
            "[(x, t), ...], one entry per call of the model"
        )
    listed = [_make_batch(batch) for batch in batches]
    if not listed:
        raise DataError(
            "there are no calibration batches: one-shot pruning needs the inputs of "
            "at least one call of the model"
        )
    return listed


def _make_batch(batch: Any) -> CalibrationBatch:
    if isinstance(batch, CalibrationBatch):
        return batch
    if isinstance(batch, Tensor):
        return CalibrationBatch((batch,))
    if isinstance(batch, Mapping):
        return CalibrationBatch((), batch)
    if isinstance(batch, tuple | list):
        return CalibrationBatch(tuple(batch))
    raise DataError(
        f"a calibration batch of type {type(batch).__name__} is neither a tensor, a tuple of "
        "inputs, a dict of inputs nor a CalibrationBatch"
    )


def hash_batches(batches: Sequence[CalibrationBatch]) -> str:
    """Returns the SHA-256 of all tensors and weights."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(repr(batch.weight).encode())
        for leaf in tree_leaves((batch.args, dict(batch.kwargs))):
            if isinstance(leaf, Tensor):
                hash_tensor(digest, leaf)
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Adds the shape, dtype and bytes of a tensor to a digest."""
    digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(plain.view(torch.uint8).numpy().tobytes())
