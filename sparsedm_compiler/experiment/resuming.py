"""Whether a folder holds the run of a configuration: options, data and weights are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import CheckpointError, ConfigError
from ..models.loading import is_function
from ..models.schedules import read_schedule
from ..train.fingerprints import (
    Fingerprint,
    fingerprint_condition,
    fingerprint_data,
    fingerprint_weights,
)
from ..train.option_checks import MAY_DIFFER as TRAINING_MAY_DIFFER
from ..train.run_folder import WHOLE, check_record, is_begun, refuse
from .inputs import OpenedInputs
from .run_config import RunConfig

BY_CONTENT = "a path; what lies there is compared instead"
SCORED_AGAIN = "the samples are drawn and scored again"
MAY_DIFFER: Mapping[str, str] = {
    "out": "the folder may be moved",
    "model.name": BY_CONTENT,
    "model.weights": BY_CONTENT,
    "data.train": BY_CONTENT,
    "data.held_out": BY_CONTENT,
    "data.null": BY_CONTENT,
    "data.vae": SCORED_AGAIN,
    "prune.backend": "the compiler of the graph, as the machine has it",
    "prune.regional": "how much of the graph that compiler sees at once",
    **{f"train.{name}": reason for name, reason in TRAINING_MAY_DIFFER.items()},
    "sample.*": SCORED_AGAIN,
    "score.*": SCORED_AGAIN,
}
"""Options that may differ when a run is resumed, and why; all others are compared as they are.

The number and the kind of devices, which are no options, may differ as well.
"""


def check_options(folder: Path, config: RunConfig) -> None:
    """Raises ConfigError where the folder holds a run of other options; opens nothing else."""
    if not is_begun(folder):
        return
    theirs, ours = flatten(read_settings(folder).as_dict()), flatten(config.as_dict())
    wrong = [n for n in ours if find_reason(n) is None and theirs.get(n) != ours[n]]
    refuse(folder, [f"{name} {theirs.get(name)!r}, not {ours[name]!r}" for name in wrong])


def check_inputs(folder: Path, prints: Mapping[str, Fingerprint]) -> None:
    """Raises ConfigError where the folder holds a run of other data or weights."""
    if is_begun(folder):
        check_record(folder, prints)


def read_settings(folder: Path) -> RunConfig:
    """Reads the configuration that a begun folder was made with. Raises CheckpointError."""
    path = folder / WHOLE
    if not path.exists():
        raise ConfigError(
            f"{folder} holds a run without {WHOLE}, made in Python: resume it there, or choose "
            "another folder"
        )
    try:
        return RunConfig.read(path)
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove {folder}") from error


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a configuration by the names of their options, "section.name".

    >>> flatten({"train": {"lr": 1.0}, "out": "runs/a"})
    {'train.lr': 1.0, 'out': 'runs/a'}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            flat[name] = value
    return flat


def find_reason(option: str) -> str | None:
    """Returns why an option may differ when a run is resumed, None where it may not."""
    return MAY_DIFFER.get(option) or MAY_DIFFER.get(option.partition(".")[0] + ".*")


def is_scored_alike(folder: Path, config: RunConfig) -> bool:
    """Returns whether the folder's samples were drawn and scored as ``config`` says."""
    theirs, ours = flatten(read_settings(folder).as_dict()), flatten(config.as_dict())
    return all(theirs.get(n) == ours[n] for n in ours if find_reason(n) == SCORED_AGAIN)


def fingerprint_run(
    config: RunConfig, inputs: OpenedInputs, model: nn.Module
) -> dict[str, Fingerprint]:
    """Returns the fingerprints of all that a configuration names by a path, by option."""
    return dict(_iterate_fingerprints(config, inputs, model))


def _iterate_fingerprints(
    config: RunConfig, inputs: OpenedInputs, model: nn.Module
) -> Iterator[tuple[str, Fingerprint]]:
    spec, source = config.data, config.model
    yield "model.name", fingerprint_architecture(source.name)
    yield "model.weights", label(source.weights or source.name, fingerprint_weights(model))
    if (schedule := read_schedule(source.name)) is not None:
        values = f"{schedule.objective} {sorted((schedule.betas or {}).items())}"
        digest = hashlib.sha256(values.encode()).hexdigest()
        yield "model.scheduler", Fingerprint(repr(str(schedule.source)), digest)
    yield "data.train", label(spec.train, fingerprint_data(inputs.data))
    if spec.held_out is not None and inputs.held_out is not None:
        yield "data.held_out", label(spec.held_out, fingerprint_data(inputs.held_out))
    if spec.null is not None and inputs.null is not None:
        yield "data.null", label(spec.null, fingerprint_condition(inputs.null))


def label(name: str, fingerprint: Fingerprint) -> Fingerprint:
    """Returns a fingerprint that is described by the option's value too."""
    return replace(fingerprint, about=f"{name!r} ({fingerprint.about})")


def fingerprint_architecture(name: str) -> Fingerprint:
    """Returns the fingerprint of a model's name: of a path that of the config in it."""
    path, content = Path(name), name
    file = path / "config.json" if path.is_dir() else path
    if not is_function(name) and file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        content = str(sorted((k, v) for k, v in values.items() if not k.startswith("_name")))
    return Fingerprint(repr(name), hashlib.sha256(content.encode()).hexdigest())
