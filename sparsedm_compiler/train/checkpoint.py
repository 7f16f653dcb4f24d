"""Checkpoints that appear whole or not at all, and that need no pickle to be read.

    checkpoints/000000064000/      after 64000 images
        student.safetensors        sdm.save's format where the student is masked, else plain
        ema.safetensors            the EMA weights, by parameter name
        optimizer.safetensors      tensors of the optimizer's state_dict
        teacher.safetensors        where the teacher is a student of this run
        state.json                 everything else; the last file written

A checkpoint is written into a folder of another name, flushed to the disk and renamed. A killed
process leaves such a folder behind, which the next save removes.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import CheckpointError, ConfigError, masked_parameters, save
from ..fileio import flush_to_disk, replace_atomically
from ..packed_tensors import copy_for_file, take_apart
from .fsdp import copy_rows_into, gather_for_file, get_local_rows
from .optimizers import join_quantized, split_quantized

VERSION = 1
PART = ".part"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run after so many ``images``: tensors by file and name, and plain values for JSON."""

    images: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def checkpoint_folder(run: Path, images: int) -> Path:
    """Returns the folder of a run's checkpoint after ``images``."""
    return run / "checkpoints" / f"{images:012d}"


def write_checkpoint(
    run: Path, images: int, state: Mapping[str, Any], files: Mapping[str, Callable[[Path], None]]
) -> None:
    """Writes the checkpoint of a run after ``images``, unless it exists.

    ``files``: by file name, the function that writes the file. Interrupted checkpoints are removed
    first. Raises CheckpointError, and then the earlier checkpoints are still there.
    """
    target = checkpoint_folder(run, images)
    part = target.with_name(target.name + PART)
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob("*" + PART):
            shutil.rmtree(left)
        part.mkdir()
        for name, save_to in files.items():
            save_to(part / name)
            flush_to_disk(part / name)
        write_text(part / "state.json", json.dumps({"version": VERSION, **state}))
        flush_to_disk(part)
        part.rename(target)
        flush_to_disk(target.parent)
    except (OSError, SafetensorError, CheckpointError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(explain_write_error(target, error)) from error


def explain_write_error(path: Path, error: Exception) -> str:
    """Returns the message about a file of a run that cannot be written."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    full = full or "No space left" in str(error)
    cause = "the disk is full" if full else str(error)
    return (
        f"cannot write {path}: {cause}. The checkpoints before it are whole; make room (keep=1 "
        "keeps fewer) and run the same command again to resume"
    )


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to a file and waits until it is on the disk."""
    path.write_text(text, encoding="utf-8")
    flush_to_disk(path)


def replace_text(path: Path, text: str) -> None:
    """Replaces the file at ``path`` by ``text``, whole or not at all. Raises CheckpointError."""
    try:
        with replace_atomically(path, durable=True) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(explain_write_error(path, error)) from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors as safetensors, each with memory of its own, on the CPU."""
    own = {name: copy_for_file(tensor) for name, tensor in tensors.items()}
    save_file(own, path, {"format": "pt"})


def save_model(model: nn.Module, path: Path, origin: Mapping[str, Any] | None = None) -> None:
    """Writes a model's weights: in ``save``'s format if it was compiled, else plain.

    ``origin``: the provenance in the record of the former.
    """
    if is_compiled(model):
        save(model, path, provenance=origin)
    else:
        save_tensors(get_unique_weights(model), path)


def is_compiled(model: nn.Module) -> bool:
    """Returns whether ``model`` was compiled by this package."""
    try:
        masked_parameters(model)
    except ConfigError:
        return False
    return True


def list_checkpoints(run: Path) -> list[int]:
    """Returns the images of every whole checkpoint of the run, fewest first."""
    files = (run / "checkpoints").glob("*/state.json")
    return sorted(int(path.parent.name) for path in files if path.parent.name.isdigit())


def read_checkpoint(run: Path, images: int) -> Checkpoint:
    """Reads the checkpoint after ``images``. Raises CheckpointError where it is damaged."""
    folder = checkpoint_folder(run, images)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {folder}: {error}; remove that folder to resume from the "
            "one before"
        ) from error
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} has version {state.get('version')!r}, this package reads {VERSION}"
        )
    return Checkpoint(images, tensors, state)


def remove_old_checkpoints(run: Path, keep: int, best: int | None) -> None:
    """Removes all checkpoints but the last ``keep`` and the one after ``best`` images."""
    for images in list_checkpoints(run)[:-keep]:
        if images != best:
            folder = checkpoint_folder(run, images)
            removed = folder.rename(folder.with_name(folder.name + PART))
            shutil.rmtree(removed)


def get_unique_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state_dict of ``model`` with every tensor once, under its first name.

    Of a packed or quantized one it has the plain tensors that it holds.
    """
    first_names: dict[tuple[Any, ...], str] = {}
    unique = {}
    for name, tensor in take_apart(model.state_dict()).items():
        where = (get_local_rows(tensor).data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if not tensor.numel() or where not in first_names:
            first_names[where] = name
            unique[name] = tensor
    return unique


def load_unique_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads the result of ``get_unique_weights``. Raises CheckpointError if it does not fit."""
    targets = get_unique_weights(model)
    try:
        missing = [name for name in targets if name not in tensors]
        if missing:
            raise RuntimeError(f"it lacks {', '.join(missing[:3])}")
        for name, target in targets.items():
            if target.shape != tensors[name].shape:
                raise RuntimeError(
                    f"{name} is {list(target.shape)}, not {list(tensors[name].shape)}"
                )
            copy_rows_into(target, tensors[name])
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint does not fit this {type(model).__name__}: {error}"
        ) from error


def flatten_state(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns ``value`` as plain JSON values and adds its tensors to ``tensors`` by their paths.

    Raises CheckpointError for a value that is neither a tensor nor plain.
    """
    if isinstance(value, Tensor) and (split := split_quantized(value)) is not None:
        parts, settings = split
        return {"$quantized": [flatten_state(parts, path, tensors), settings]}
    if isinstance(value, Tensor):
        tensors[path] = gather_for_file(value)
        return {"$tensor": path}
    if isinstance(value, Mapping):
        pairs = [
            [key, flatten_state(part, f"{path}.{key}", tensors)] for key, part in value.items()
        ]
        return {"$map": pairs}
    if isinstance(value, tuple):
        return {"$tuple": flatten_state([*value], path, tensors)}
    if isinstance(value, list):
        return [flatten_state(part, f"{path}.{n}", tensors) for n, part in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"the optimizer keeps a {type(value).__name__} at {path}, which has no safe form on disk"
    )


def unflatten_state(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the value that ``flatten_state`` made ``value`` and ``tensors`` from."""
    if isinstance(value, dict) and "$tensor" in value:
        return tensors[value["$tensor"]]
    if isinstance(value, dict) and "$quantized" in value:
        parts, settings = value["$quantized"]
        return join_quantized(unflatten_state(parts, tensors), settings)
    if isinstance(value, dict) and "$tuple" in value:
        return tuple(unflatten_state(value["$tuple"], tensors))
    if isinstance(value, dict):
        return {key: unflatten_state(part, tensors) for key, part in value["$map"]}
    if isinstance(value, list):
        return [unflatten_state(part, tensors) for part in value]
    return value
