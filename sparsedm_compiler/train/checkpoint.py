"""Checkpoints that appear whole or not at all, and that need no pickle to be read.

    checkpoints/000000064000/      after 64000 images
        student.safetensors        sdm.save's format where the student is masked, else plain
        ema.safetensors            the average, by parameter name
        optimizer.safetensors      tensors of the optimizer's state_dict
        teacher.safetensors        where the teacher is a student of this run
        state.json                 everything else; the last file written

A checkpoint is written into a folder of another name, flushed to the disk and renamed. What a kill
leaves behind is such a folder, which the next save removes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import CheckpointError, ConfigError, masked_parameters, save
from ..fileio import replace_atomically
from .fsdp import here, put, whole

VERSION = 1
PART = ".part"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run after so many ``images``: tensors by file and name, and plain values for JSON."""

    images: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def folder_of(run: Path, images: int) -> Path:
    """Where the checkpoint after ``images`` of a run lies."""
    return run / "checkpoints" / f"{images:012d}"


def write(
    run: Path, images: int, state: Mapping[str, Any], files: Mapping[str, Callable[[Path], None]]
) -> None:
    """Write the checkpoint of a run after ``images``, unless there is one.

    ``files``: what writes each file, by its name. Checkpoints that were interrupted are removed
    first. Raises CheckpointError, and then the earlier checkpoints are still there.
    """
    target = folder_of(run, images)
    part = target.with_name(target.name + PART)
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob("*" + PART):
            shutil.rmtree(left)
        part.mkdir()
        for name, save in files.items():
            save(part / name)
            flush(part / name)
        write_text(part / "state.json", json.dumps({"version": VERSION, **state}))
        flush(part)
        part.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError, CheckpointError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(unwritable(target, error)) from error


def unwritable(path: Path, error: Exception) -> str:
    """The sentence for a checkpoint that cannot be written."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    full = full or "No space left" in str(error)
    what = "the disk is full" if full else str(error)
    return (
        f"cannot write {path}: {what}. The checkpoints before it are whole; make room (keep=1 "
        "keeps fewer) and run the same command again to resume"
    )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that the file is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Replace the file at ``path`` by ``text``, whole or not at all. Raises CheckpointError."""
    try:
        with replace_atomically(path) as part:
            write_text(part, text)
    except OSError as error:
        raise CheckpointError(unwritable(path, error)) from error


def flush(path: Path) -> None:
    """Have the file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, each with memory of its own."""
    own = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(own, path, {"format": "pt"})


def save_model(model: nn.Module, path: Path) -> None:
    """Write a model's weights: as ``save`` does where it was compiled, else plain."""
    if is_compiled(model):
        save(model, path)
    else:
        save_tensors(weights_of(model), path)


def is_compiled(model: nn.Module) -> bool:
    """Whether ``compile`` made ``model``."""
    try:
        masked_parameters(model)
    except ConfigError:
        return False
    return True


def list_checkpoints(run: Path) -> list[int]:
    """The images of every whole checkpoint of the run, fewest first."""
    found = (run / "checkpoints").glob("*/state.json")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


def read(run: Path, images: int) -> Checkpoint:
    """The checkpoint after ``images``. Raises CheckpointError where it is damaged."""
    folder = folder_of(run, images)
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


def prune(run: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the last ``keep`` and the best."""
    for images in list_checkpoints(run)[:-keep]:
        if images != best:
            folder = folder_of(run, images)
            gone = folder.rename(folder.with_name(folder.name + PART))
            shutil.rmtree(gone)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of ``model`` with every tensor once, under its first name."""
    seen: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        where = (here(tensor).data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if not tensor.numel() or where not in seen:
            seen[where] = name
            found[name] = tensor
    return found


def put_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what ``weights_of`` gave. Raises CheckpointError where it does not fit."""
    wanted = weights_of(model)
    try:
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise RuntimeError(f"it lacks {', '.join(missing[:3])}")
        for name, target in wanted.items():
            if target.shape != tensors[name].shape:
                raise RuntimeError(
                    f"{name} is {list(target.shape)}, not {list(tensors[name].shape)}"
                )
            put(target, tensors[name])
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint does not fit this {type(model).__name__}: {error}"
        ) from error


def flattened(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as plain JSON values, its tensors moved into ``tensors`` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = whole(value)
        return {"$tensor": path}
    if isinstance(value, Mapping):
        pairs = [[key, flattened(part, f"{path}.{key}", tensors)] for key, part in value.items()]
        return {"$map": pairs}
    if isinstance(value, tuple):
        return {"$tuple": flattened([*value], path, tensors)}
    if isinstance(value, list):
        return [flattened(part, f"{path}.{n}", tensors) for n, part in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"the optimizer keeps a {type(value).__name__} at {path}, which has no safe form on disk"
    )


def restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``flattened`` was given."""
    if isinstance(value, dict) and "$tensor" in value:
        return tensors[value["$tensor"]]
    if isinstance(value, dict) and "$tuple" in value:
        return tuple(restored(value["$tuple"], tensors))
    if isinstance(value, dict):
        return {key: restored(part, tensors) for key, part in value["$map"]}
    if isinstance(value, list):
        return [restored(part, tensors) for part in value]
    return value
