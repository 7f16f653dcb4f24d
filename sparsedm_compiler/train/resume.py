"""Saving a run into its folder, and going on from there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import CheckpointError, ConfigError
from .checkpoint import (
    Checkpoint,
    flattened,
    list_checkpoints,
    prune,
    put_weights,
    read,
    restored,
    save_model,
    save_tensors,
    weights_of,
    write,
    write_whole,
)
from .ema import Average
from .finetune_config import FREE, FinetuneConfig
from .fsdp import state_like, whole_state
from .result import HeldOut
from .state import Progress, Run

SAVES = 10
"""Checkpoints of a run that does not say how many."""


def save_every(config: FinetuneConfig) -> int:
    """Images between two checkpoints."""
    return config.save_every or max(1, math.ceil(config.images / SAVES))


def save_run(run: Run) -> None:
    """Write a checkpoint, unless there is one, and remove those no longer kept.

    Every process calls it; the main one writes.
    """
    if run.folder is None:
        return
    run.drain()
    run.watch.look()
    tensors: dict[str, torch.Tensor] = {}
    optimizer = flattened(run.engine.optimizer.state_dict(), "optimizer", tensors)
    losses = torch.tensor(run.progress.losses, dtype=torch.float64).reshape(-1, 3)
    files: dict[str, Callable[[Path], None]] = {
        "student.safetensors": saving(run, averaged=False),
        "optimizer.safetensors": partial(save_tensors, tensors),
        "losses.safetensors": partial(save_tensors, {"losses": losses}),
    }
    if run.average is not None:
        files["ema.safetensors"] = saving(run, averaged=True)
    if run.teacher is not None and run.teacher is not run.given:
        files["teacher.safetensors"] = partial(save_model, run.teacher)
    state = {
        **run.progress.plain(),
        "optimizer": optimizer,
        "scaler": run.engine.scaler_state(),
        "updates": 0 if run.average is None else run.average.updates,
    }
    if run.engine.main:
        write(run.folder, run.progress.seen, state, files)
        prune(run.folder, run.config.keep, best(run))
    run.engine.wait()


def saving(run: Run, *, averaged: bool) -> Callable[[Path], None]:
    """What writes the student, or its average where there is one, on the main process.

    Every process must ask: a sharded student is gathered now, any other when it is written.
    """
    average = run.average if averaged else None
    if not run.config.shard:
        return partial(save_averaged, run.student, average)
    with nullcontext() if average is None else average.applied():
        gathered = whole_state(run.student)
    return partial(save_gathered, run.engine.template, gathered)


def save_averaged(model: nn.Module, average: Average | None, path: Path) -> None:
    """Write ``model`` with its average, or as it is."""
    with nullcontext() if average is None else average.applied():
        save_model(model, path)


def save_gathered(template: nn.Module | None, state: Mapping[str, Tensor], path: Path) -> None:
    """Write ``state`` in the form of ``template``, the model before it was sharded."""
    assert template is not None, "the main process has it"
    template.load_state_dict(dict(state))
    save_model(template, path)


def best(run: Run) -> int | None:
    """The images of the checkpoint nearest before the lowest held-out loss, None without one."""
    assert run.folder is not None
    saved = set(list_checkpoints(run.folder))
    known: list[HeldOut] = [entry for entry in run.progress.held_out if entry.images in saved]
    return min(known, key=lambda entry: entry.final).images if known else None


def resume(run: Run) -> Checkpoint | None:
    """Put the last checkpoint of the folder into ``run``; it, or None where there is none.

    Raises CheckpointError where it is damaged or fits another model.
    """
    assert run.folder is not None
    saved = list_checkpoints(run.folder)
    if not saved:
        return None
    found = read(run.folder, saved[-1])
    try:
        run.progress = Progress.of(found.state, found.tensors["losses"]["losses"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint after {found.images} images in {run.folder} is damaged: {error!r}"
        ) from error
    return found


def restore(run: Run, found: Checkpoint) -> None:
    """Weights, average, optimizer and scaler of ``found``, once its stage has been set up."""
    put_weights(run.student, found.tensors["student"])
    if run.average is not None:
        names = weights_of(run.student)
        averages: Mapping[str, Any] = found.tensors["ema"]
        run.average.load({n: averages[n] for n in names if n in averages}, found.state["updates"])
    state = restored(found.state["optimizer"], found.tensors["optimizer"])
    run.engine.optimizer.load_state_dict(state_like(state, run.engine.optimizer.optimizer))
    run.engine.load_scaler(found.state["scaler"])
    run.watch.look()


def check_config(folder: Path, config: FinetuneConfig) -> None:
    """Write config.json, or raise ConfigError where the folder holds a run of another config."""
    file, ours = folder / "config.json", config.as_dict()
    if file.exists() and list_checkpoints(folder):
        try:
            theirs = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        wrong = [n for n in ours if n not in FREE and theirs.get(n) != ours[n]]
        if wrong:
            name = wrong[0]
            raise ConfigError(
                f"{folder} holds a run with {name} {theirs.get(name)!r}, not {ours[name]!r}"
                + (f" (and other {', '.join(wrong[1:])})" if wrong[1:] else "")
                + ": resume it with its own options, choose another folder, or remove that one"
            )
    write_whole(file, json.dumps(ours, indent=2) + "\n")
