"""``read_pruned``: the weights that other pruning tools have saved, with their zeros in place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tabulate import tabulate
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor

from ..errors import CheckpointError
from ..masks.detect import detect_pattern
from ..patterns import Pattern
from .bitmask24 import expand_bitmasks
from .container import KEY, read_raw
from .fold_masks import fold_masks
from .pickled import PICKLES, read_pickle, take_state_dict

ZEROS = "zeros in place"
"""What a row says of a weight without a mask whose zeros satisfy a pattern."""

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
"""A file, or what is in it."""


@dataclass(frozen=True, slots=True)
class PrunedRow:
    """One pruned weight.

    Attributes:
        name: Its name in the plain model.
        shape: Its shape.
        tool: The tool whose mask it had, or "zeros in place".
        pattern: The sparsest pattern that its zeros satisfy; None for none.
        zeros: The share of its values that are zero.
        dropped: How many of its values were not zero before its mask was applied.
    """

    name: str
    shape: tuple[int, ...]
    tool: str
    pattern: Pattern | None
    zeros: float
    dropped: int


@dataclass(frozen=True, slots=True)
class PrunedWeights:
    """What ``read_pruned`` has read; ``str()`` is a table.

    Attributes:
        tensors: The state_dict of the plain model, masks multiplied in.
        rows: One for every pruned weight.
    """

    tensors: dict[str, Tensor]
    rows: tuple[PrunedRow, ...]

    def __str__(self) -> str:
        head = ("weight", "shape", "pruned by", "pattern", "zeros", "dropped")
        lines = [
            (
                *(row.name, "x".join(map(str, row.shape)), row.tool),
                *(row.pattern or "none", f"{row.zeros:.3f}", row.dropped),
            )
            for row in self.rows
        ]
        tools = Counter(row.tool for row in self.rows)
        counts = ", ".join(f"{count} by {tool}" for tool, count in tools.items()) or "none pruned"
        rest = len(self.tensors) - len(self.rows)
        table = tabulate(lines, head, disable_numparse=True)
        return f"{table}\n{len(self.rows)} pruned weights ({counts}), {rest} other tensors"


def read_pruned(source: Source, masks: Source | None = None) -> PrunedWeights:
    """Reads what another pruning tool has saved: weights times masks, under the plain names.

    Knows apex ASP, ModelOpt, torch.nn.utils.prune, the fake sparsity of torch.ao.pruning and
    torchao, torch's semi-structured tensors (CUTLASS), compressed-tensors' bitmasks, and weights
    whose zeros are in place, as of Wanda, SparseGPT and OBS-Diff. ``compile(model, mode="infer")``
    then recognizes the patterns. No code that a file may hold is run.

    Args:
        source: A state_dict, or a file of one: safetensors, or .pt, .pth, .bin or .ckpt (also one
            of ModelOpt's ``mto.save``).
        masks: The ``state_dict()`` of a sparsifier of torch.ao.pruning or torchao, or its file;
            or a dictionary of masks by the weights' names. None where the masks are in ``source``.

    Returns:
        The tensors for ``model.load_state_dict``, and a report of what is pruned.

    Raises:
        CheckpointError: If a file cannot be read or holds more than tensors, or a mask and its
            weight do not go together.

    Example:
        >>> import torch
        >>> kept = torch.tensor([[False, False, True, True]])
        >>> asp = {"fc.weight": torch.ones(1, 4), "fc.__weight_mma_mask": kept}
        >>> pruned = read_pruned(asp)
        >>> pruned.tensors
        {'fc.weight': tensor([[0., 0., 1., 1.]])}
        >>> pruned.rows[0].tool, str(pruned.rows[0].pattern)
        ('apex ASP', '2:4')
    """
    label = "the state_dict" if isinstance(source, Mapping) else str(_require_path(source))
    tensors = _read(source, label)
    chosen = None if masks is None else _read_masks(masks)
    try:
        for name, tensor in tensors.items():
            _require_dense(name, tensor)
        folded = fold_masks(expand_bitmasks(tensors), chosen)
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error
    rows = []
    for name, weight in folded.tensors.items():
        pattern = detect_pattern(weight)
        if name in folded.tools or pattern is not None:
            tool = folded.tools.get(name, ZEROS)
            zeros = 1 - int((weight != 0).sum()) / max(1, weight.numel())
            dropped = folded.dropped.get(name, 0)
            rows.append(PrunedRow(name, tuple(weight.shape), tool, pattern, zeros, dropped))
    return PrunedWeights(folded.tensors, tuple(rows))


def _read(source: Source, label: str) -> dict[str, Tensor]:
    """Returns the tensors of a file of others, or of a state_dict."""
    if isinstance(source, Mapping):
        return take_state_dict(source, label)
    tensors, metadata = read_raw(Path(source))
    if KEY in metadata:
        raise CheckpointError(f"{label} is a file of ours, which sparsedm_compiler.load reads")
    return tensors


def _read_masks(source: Source) -> dict[str, Tensor]:
    """Returns masks by the names of their weights, of a sparsifier's state_dict or plain ones."""
    content: Mapping[str, Any] = (
        source if isinstance(source, Mapping) else _read_any(_require_path(source))
    )
    state = content.get("state")
    if isinstance(state, Mapping):
        entries = {str(name): entry for name, entry in state.items() if isinstance(entry, Mapping)}
        content = {n: e["mask"] for n, e in entries.items() if "mask" in e}
    if not content:
        raise CheckpointError("masks holds no mask: leave it out, or call sparsifier.step() first")
    return take_state_dict(content, "masks")


def _require_path(source: Any) -> Path:
    """Returns the path of a file. Raises CheckpointError for anything else."""
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"a {type(source).__name__} is neither a state_dict nor a file")
    return Path(source)


def _require_dense(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for a tensor whose values do not lie in memory one by one."""
    kind = "quantized" if tensor.is_quantized else "on the meta device" if tensor.is_meta else ""
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
    if kind and not isinstance(tensor, SparseSemiStructuredTensor):
        raise CheckpointError(f"{name!r} is {kind}: save its dense values, as of .to_dense()")


def _read_any(path: Path) -> Mapping[str, Any]:
    return read_pickle(path) if path.suffix in PICKLES else read_raw(path)[0]
