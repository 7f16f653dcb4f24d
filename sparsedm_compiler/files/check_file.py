"""``check_file``: the patterns that the weights of a file satisfy, beside those it declares."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from ..errors import CheckpointError, PackError
from ..masks.detect import detect_pattern
from ..patterns import Pattern
from .compact import find_kept
from .container import COMPACT, DENSE, STATE, StoredFile, read_file
from .mask_code import complete_mask

_DENSE_TEXT = "dense: "


@dataclass(frozen=True, slots=True)
class WeightRow:
    """One weight of a file.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        dtype: Its dtype, e.g. "bfloat16".
        zeros: The share of its values that are zero.
        declared: The pattern that the header names for it; None where it names none.
        satisfied: The sparsest pattern that its zeros satisfy; None for none.
        fits: Whether its zeros satisfy the wanted pattern, else the declared one; None where there
            is neither, or where the file holds latent weights, which are masked when they run.
        stored_bytes: Its size in the file.
        dense_bytes: Its size with all its zeros.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: float
    declared: Pattern | None
    satisfied: Pattern | None
    fits: bool | None
    stored_bytes: int
    dense_bytes: int


@dataclass(frozen=True, slots=True)
class FileReport:
    """What ``check_file`` has read; ``str()`` is a table.

    Attributes:
        path: The file.
        form: "state", "dense" or "compact"; None for a file without our record.
        latent: Whether declared patterns are masked only when the model runs.
        rows: One for every weight of two or more dimensions.
        others: How many tensors have fewer.
        provenance: Where the weights are from, as far as the file says.
    """

    path: Path
    form: str | None
    latent: bool
    rows: tuple[WeightRow, ...]
    others: int
    provenance: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every weight satisfies the pattern that is declared or was wanted."""
        return all(row.fits is not False for row in self.rows)

    def __str__(self) -> str:
        head = ("weight", "shape", "dtype", "zeros", "declared", "satisfied", "fits", "bytes")
        words = {None: "", True: "yes", False: "NO"}
        lines = [
            (
                *(row.name, "x".join(map(str, row.shape)), row.dtype, f"{row.zeros:.3f}"),
                *(row.declared or "", row.satisfied or "", words[row.fits]),
                f"{row.stored_bytes:,}",
            )
            for row in self.rows
        ]
        kind = "no record of sparsedm" if self.form is None else f"form {self.form}"
        latent = ", latent weights that are masked when they run" if self.latent else ""
        stored, dense = (
            sum(row.stored_bytes for row in self.rows),
            sum(row.dense_bytes for row in self.rows),
        )
        share = f" ({stored / dense:.3f} of dense)" if dense else ""
        return (
            f"{self.path}: {kind}{latent}\n{tabulate(lines, head, disable_numparse=True)}\n"
            f"{len(self.rows)} weights in {stored:,} bytes{share}, {self.others} other tensors"
        )


def check_file(path: str | os.PathLike[str], pattern: str | Pattern | None = None) -> FileReport:
    """Reports which patterns the weights of a file satisfy.

    Args:
        path: A file of ``save``, ``save_pretrained``, of any tool that ``read_pruned`` knows, or
            any other state_dict.
        pattern: The pattern to ask every weight for; None asks for the declared ones.

    Returns:
        A row for every weight of two or more dimensions.

    Raises:
        CheckpointError: If the file is missing, damaged or of another version, or holds weights
            packed for a kernel.
        PatternError: If ``pattern`` is misspelled.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"w": torch.tensor([[0.0, 0, 1, 2]])}, f"{folder}/w.safetensors")
        ...     report = check_file(f"{folder}/w.safetensors")
        >>> str(report.rows[0].satisfied), report.ok
        ('2:4', True)
    """
    wanted = None if pattern is None else Pattern.parse(pattern)
    stored = read_file(path)
    declared = read_patterns(stored)
    record = stored.record or {}
    latent = record.get("form") == STATE and (record["options"] or {}).get("mode") == "train"
    tensors = stored.expand()
    for alias in record.get("aliases", {}):
        del tensors[alias]
    rows = tuple(
        _describe(name, weight, stored, declared.get(name), wanted, latent)
        for name, weight in tensors.items()
        if weight.dim() >= 2
    )
    form = record.get("form")
    provenance = record.get("provenance", {})
    return FileReport(stored.path, form, latent, rows, len(tensors) - len(rows), provenance)


def _describe(
    name: str,
    weight: Tensor,
    stored: StoredFile,
    declared: Pattern | None,
    wanted: Pattern | None,
    latent: bool,
) -> WeightRow:
    compact = stored.compact.get(name)
    size = weight.nbytes if compact is None else compact.values.nbytes + compact.indices.nbytes
    expected = wanted or (None if latent else declared)
    kept = find_kept(weight)
    return WeightRow(
        name,
        tuple(weight.shape),
        str(weight.dtype).removeprefix("torch."),
        1 - int(kept.sum()) / max(1, weight.numel()),
        declared,
        detect_pattern(kept),
        None if expected is None else satisfies(kept, expected),
        size,
        weight.nbytes,
    )


def satisfies(kept: Tensor, pattern: Pattern) -> bool:
    """Returns whether ``kept`` [out, in, *kernel], True for non-zeros, lies in a pattern's mask."""
    if pattern.misfit(kept.shape[0], kept.shape[1]) is not None:
        return False
    try:
        complete_mask(kept, pattern)
    except PackError:
        return False
    return True


def read_patterns(stored: StoredFile) -> dict[str, Pattern]:
    """Returns the patterns that the record of a file declares, by name; {} without a record.

    Raises CheckpointError for a damaged record, and for weights packed for a kernel.
    """
    record = stored.record
    if record is None:
        return {}
    if record["packed"]:
        raise CheckpointError(
            f"{stored.path} holds weights packed for a kernel: load it into its model, then "
            "sparsedm_compiler.save(model, path, form='compact')"
        )
    try:
        texts = {
            name: text.partition(" ")[2]
            for name, text in record["decisions"].items()
            if not text.partition(" ")[2].startswith(_DENSE_TEXT)
        }
        patterns = {name: Pattern.parse(text) for name, text in texts.items()}
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"{stored.path}: its decisions are damaged: {error}") from error
    return patterns | {name: weight.pattern for name, weight in stored.compact.items()}


HOLDS_ZEROS = (DENSE, COMPACT)
"""The forms whose pruned weights are zero in the file."""
