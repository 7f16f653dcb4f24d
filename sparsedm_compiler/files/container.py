"""safetensors files with our record in their header: read whole or refused, written whole or not.

Nothing in a file is code: tensors are bytes, the record is JSON. What the record says is checked
against the tensors before anything of it is used. Files of others may be pickled, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, ConfigError, PackError
from ..fileio import replace_atomically
from ..patterns import Pattern
from .bitmask24 import expand_bitmasks
from .compact import INDICES, VALUES, CompactWeight
from .fold_masks import fold_masks
from .pickled import PICKLES, read_state_dict

KEY = "sparsedm"
"""The key of the record in the metadata of a safetensors file."""

VERSION = 5
"""The version of what the files hold; ``docs/reference/format.md`` describes it."""

STATE, DENSE, COMPACT = FORMS = ("state", "dense", "compact")
"""What a file holds of a pruned weight: as the state_dict has it, with zeros, or kept values."""

PROVENANCE = {"base_model": str, "method": str, "images": int, "loss": float, "note": str}
"""The fields of a record that say where the weights are from; all may be left out."""

_FIELDS: dict[str, tuple[Any, tuple[type, ...]]] = {
    "class": (None, (str, type(None))),
    "form": (STATE, (str,)),
    "options": (None, (dict, type(None))),
    "known": ([], (list,)),
    "frozen": ([], (list,)),
    "decisions": ({}, (dict,)),
    "packed": ({}, (dict,)),
    "compact": ({}, (dict,)),
    "aliases": ({}, (dict,)),
    "soft": ({}, (dict,)),
    "provenance": ({}, (dict,)),
}
"""The fields of a record beside the version: what one that is left out means, and its types."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """All of a file.

    Attributes:
        path: Where it lies.
        tensors: The tensors that are stored as they are.
        record: Our record; None for a file of others.
        compact: The weights that are stored compact.
        metadata: The other metadata of the header.
    """

    path: Path
    tensors: dict[str, Tensor]
    record: dict[str, Any] | None
    compact: dict[str, CompactWeight] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def expand(self) -> dict[str, Tensor]:
        """Returns all tensors by name, compact ones and those under other names, too.

        Raises CheckpointError for numbers that describe no weight.
        """
        tensors = dict(self.tensors)
        for name, weight in self.compact.items():
            tensors[name] = self._unpack(name, weight)
        aliases = {} if self.record is None else self.record["aliases"]
        return tensors | {alias: tensors[name] for alias, name in aliases.items()}

    def _unpack(self, name: str, weight: CompactWeight) -> Tensor:
        try:
            return weight.unpack()
        except PackError as error:
            raise CheckpointError(f"{self.path}: {name!r} is damaged: {error}") from error


def read_file(path: str | os.PathLike[str]) -> StoredFile:
    """Reads a file with our record, or a state_dict of others (safetensors, or pickled tensors).

    Weights of compressed-tensors (sparse-bitmask, sparse-24-bitmask) are expanded, and masks of
    pruning tools (``fold_masks``) multiplied in.

    Raises CheckpointError for a file that is missing, damaged or of another version.
    """
    path = Path(path)
    tensors, metadata = read_raw(path)
    text = metadata.pop(KEY, None)
    try:
        record = None if text is None else _read_record(text)
        compact = {} if record is None else _read_compact(record["compact"], tensors)
        if record is None:
            tensors = fold_masks(expand_bitmasks(tensors)).tensors
        else:
            _check_aliases(record["aliases"], tensors.keys() | compact.keys())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its sparsedm metadata is damaged: {error!r}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return StoredFile(path, tensors, record, compact, metadata)


def read_raw(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors of a file as they are stored, and the metadata of its header.

    Raises CheckpointError for a file that cannot be read or holds more than tensors.
    """
    if path.suffix in PICKLES:
        return read_state_dict(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from error


def read_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns the record in the header of a file; None for a file of others. Reads no tensor.

    Raises CheckpointError for a file that is missing, damaged or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from error
    try:
        return None if text is None else _read_record(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its sparsedm metadata is damaged: {error!r}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_record(text: str) -> dict[str, Any]:
    """Returns the record with every field that files of this version have."""
    try:
        record: Any = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    version = record.get("version")
    if version != VERSION:
        raise CheckpointError(f"it has format version {version!r}, this package reads {VERSION}")
    record = {**{name: default for name, (default, _) in _FIELDS.items()}, **record}
    for name, (_, kinds) in _FIELDS.items():
        if not isinstance(record[name], kinds):
            raise ValueError(f"{name} is a {type(record[name]).__name__}")
    texts = [*record["aliases"].values(), *record["decisions"].values()]
    texts += [*record["known"], *record["frozen"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name or a decision is no text")
    if record["form"] not in FORMS:
        raise ValueError(f"form {record['form']!r} is none of {', '.join(FORMS)}")
    check_provenance(record["provenance"])
    return dict(record)


def _read_compact(plain: Any, tensors: dict[str, Tensor]) -> dict[str, CompactWeight]:
    """Takes the compact weights out of ``tensors``; their sizes are checked."""
    weights = {}
    for name, entry in plain.items():
        values, indices = tensors.pop(name + VALUES), tensors.pop(name + INDICES)
        if name in tensors or not all(type(size) is int for size in entry["shape"]):
            raise ValueError(f"{name!r} is there twice, or its shape is not of integers")
        pattern = Pattern.parse(entry["pattern"])
        weight = CompactWeight(pattern, tuple(entry["shape"]), values, indices)
        weight.check_sizes()
        weights[name] = weight
    return weights


def _check_aliases(aliases: Mapping[str, str], names: set[str]) -> None:
    """Raises ValueError for a second name of no tensor, or of another tensor."""
    for alias, name in aliases.items():
        if name not in names or alias in names:
            raise ValueError(f"{alias!r} is a second name for {name!r}, which is not so")


def check_provenance(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a provenance that are set. Raises ConfigError for others than those."""
    for name, value in values.items():
        kind = PROVENANCE.get(name)
        if kind is None:
            raise ConfigError(f"provenance {name!r} is none of {', '.join(PROVENANCE)}")
        if value is not None and not isinstance(value, (kind, int) if kind is float else kind):
            raise ConfigError(f"provenance {name} {value!r} is not a {kind.__name__}")
    return {name: value for name, value in values.items() if value is not None}


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None
) -> None:
    """Writes tensors with our record; the file appears whole or not at all.

    Raises CheckpointError if it cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write {target}: there is no folder {target.parent}")
    metadata = {"format": "pt"}
    if record is not None:
        metadata[KEY] = json.dumps(record)
    try:
        with replace_atomically(target) as part:
            save_file(dict(tensors), part, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


def split_compact(
    tensors: Mapping[str, Tensor], patterns: Mapping[str, Pattern]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a compact file, and the entries of its record.

    ``patterns``: by name, of the weights to store compact; their zeros must satisfy them
    (PatternError). A dense pattern leaves a weight as it is.
    """
    stored, entries = {}, {}
    for name, tensor in tensors.items():
        pattern = patterns.get(name)
        if pattern is None or pattern.is_dense:
            stored[name] = tensor
            continue
        weight = CompactWeight.pack(tensor, pattern, name)
        stored[name + VALUES], stored[name + INDICES] = weight.values, weight.indices
        entries[name] = weight.describe()
    return stored, entries
