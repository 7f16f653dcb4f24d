"""``convert_file``: rewrites a file of sparse weights, dense with zeros or compact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import CompileConfig
from ..errors import CheckpointError, ConfigError
from ..masks.detect import detect_pattern
from ..masks.nm_mask import apply_mask, nm_mask
from ..patterns import Pattern
from .check_file import HOLDS_ZEROS, read_patterns, satisfies
from .compact import find_kept
from .container import (
    COMPACT,
    VERSION,
    StoredFile,
    check_provenance,
    read_file,
    split_compact,
    write_file,
)
from .pickled import PICKLES
from .pruned import read_pruned


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    form: str = COMPACT,
    pattern: str | Pattern | None = None,
    masks: str | os.PathLike[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Rewrites a safetensors file dense with zeros or compact; latent weights are masked.

    Args:
        source: A file of ``save``, ``save_pretrained``, or of any tool that ``read_pruned`` knows.
        target: The file to write; its folder must exist.
        form: "dense" or "compact".
        pattern: For a source without our record: the pattern of the weights that satisfy it. None
            takes the sparsest that every weight satisfies.
        masks: The file of a sparsifier's state_dict, as in ``read_pruned``; None where there is
            none.
        provenance: Fields to add to those of the source, as in ``save``; None adds none.

    Raises:
        CheckpointError: If the source is damaged, holds nothing sparse or holds weights packed for
            a kernel, or if the target cannot be written.
        ConfigError: For an unknown form or field, a target called like a pickled file, and a
            pattern beside those of a record.
        PatternError: If ``pattern`` is misspelled.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"w": torch.tensor([[0.0, 1, 2, 0]])}, f"{folder}/w.safetensors")
        ...     convert_file(f"{folder}/w.safetensors", f"{folder}/c.safetensors")
        ...     read_file(f"{folder}/c.safetensors").compact["w"].values
        tensor([1., 2.])
    """
    if form not in HOLDS_ZEROS:
        raise ConfigError(f"form {form!r} is none of {', '.join(HOLDS_ZEROS)}")
    if Path(target).suffix in PICKLES:
        raise ConfigError(f"{target} would hold safetensors: call it .safetensors")
    added = check_provenance(provenance or {})
    if masks is None:
        stored = read_file(source)
    else:
        stored = StoredFile(Path(source), read_pruned(source, masks).tensors, None)
    tensors = stored.expand()
    if stored.record is None:
        patterns = _choose_patterns(tensors, None if pattern is None else Pattern.parse(pattern))
        record = _make_record(tensors, patterns)
    else:
        if pattern is not None:
            raise ConfigError(f"{source} has a record of its patterns; leave pattern= out")
        patterns, record = read_patterns(stored), dict(stored.record)
        tensors = _mask_latent(tensors, patterns, stored)
    if not patterns:
        raise CheckpointError(
            f"{source} holds nothing sparse: no weight satisfies a pattern, or the model had not "
            "been called when it was saved"
        )
    record.update(form=form, compact={}, provenance={**record["provenance"], **added})
    if form == COMPACT:
        tensors, record["compact"] = split_compact(tensors, patterns)
    write_file(target, tensors, record)


def _choose_patterns(tensors: Mapping[str, Tensor], wanted: Pattern | None) -> dict[str, Pattern]:
    """Returns the patterns of the weights that satisfy ``wanted``, or any if it is None."""
    patterns = {}
    for name, weight in tensors.items():
        if weight.dim() < 2:
            continue
        kept = find_kept(weight)
        if wanted is not None and kept.any() and satisfies(kept, wanted):
            patterns[name] = wanted
        elif wanted is None and (pattern := detect_pattern(kept)) is not None:
            patterns[name] = pattern
    return patterns


def _make_record(tensors: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> dict[str, Any]:
    """Returns the record of a file that had none: a model that runs every weight as its zeros."""
    options = replace(CompileConfig.create(None, mode="infer"), overrides=tuple(patterns.items()))
    return {
        "version": VERSION,
        "class": None,
        "options": options.to_dict(),
        "known": sorted(tensors),
        "decisions": {},
        **{"aliases": {}, "packed": {}, "provenance": {}},
    }


def _mask_latent(
    tensors: Mapping[str, Tensor], patterns: Mapping[str, Pattern], stored: StoredFile
) -> dict[str, Tensor]:
    """Returns the tensors without second names, and masked where they may not be yet."""
    assert stored.record is not None
    tensors = {n: w for n, w in tensors.items() if n not in stored.record["aliases"]}
    if stored.record["form"] in HOLDS_ZEROS:
        return tensors
    return tensors | {
        name: apply_mask(tensors[name], nm_mask(tensors[name], pattern, name=name))
        for name, pattern in patterns.items()
        if name in tensors
    }
