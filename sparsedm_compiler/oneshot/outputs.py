"""The outputs of a model's calls, to be compared before and after a change of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from ..errors import DataError
from .batches import CalibrationBatch
from .targets import explain_call


@torch.no_grad()
def run_once(model: nn.Module, batch: CalibrationBatch) -> list[Tensor]:
    """Returns what ``call_once`` does, without gradients."""
    return call_once(model, batch)


def call_once(model: nn.Module, batch: CalibrationBatch) -> list[Tensor]:
    """Returns the floating-point outputs of one call, the same for the same weights.

    Raises:
        DataError: The model cannot be called with the batch, or nothing in its output is a
            floating-point tensor.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = batch.to_model(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            out = model(*moved.args, **moved.kwargs)
        except Exception as error:
            raise explain_call(model, batch, error) from error
    outputs = [*iterate_outputs(out)]
    if not outputs:
        raise DataError(
            f"the output of {type(model).__name__} holds no floating-point tensor, so it cannot "
            "be seen whether it changes"
        )
    return outputs


def iterate_outputs(output: Any) -> Iterator[Tensor]:
    """Yields the floating-point tensors of an output, those in dataclasses too."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            if leaf.is_complex():
                yield torch.view_as_real(leaf)
            elif leaf.is_floating_point():
                yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from iterate_outputs([getattr(leaf, field.name) for field in fields(leaf)])


def require_finite(model: nn.Module, outputs: Iterable[Tensor]) -> None:
    """Raises DataError where outputs of the dense model hold NaN or Inf."""
    if not all(bool(x.isfinite().all()) for x in outputs):
        raise DataError(
            f"the outputs of {type(model).__name__} hold NaN or Inf in the calibration run, so "
            "it cannot be measured how they change"
        )


def pick_kinds(batches: Sequence[CalibrationBatch]) -> list[CalibrationBatch]:
    """Returns the first batch of every kind: of other inputs, shapes, dtypes or Python values."""
    kinds: dict[tuple[str, ...], CalibrationBatch] = {}
    for batch in batches:
        leaves, structure = tree_flatten((batch.args, dict(batch.kwargs)))
        parts = [f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x) for x in leaves]
        kinds.setdefault((str(structure), *parts), batch)
    return [*kinds.values()]
