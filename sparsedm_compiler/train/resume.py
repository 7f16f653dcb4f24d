"""Saving a run into its folder, and resuming it from there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import CheckpointError, ConfigError, get_masks, masked_parameters
from .checkpoint import (
    Checkpoint,
    flatten_state,
    get_unique_weights,
    is_compiled,
    list_checkpoints,
    load_unique_weights,
    read_checkpoint,
    remove_old_checkpoints,
    save_model,
    save_tensors,
    unflatten_state,
    write_checkpoint,
)
from .ema import Ema
from .finetune_config import FinetuneConfig
from .fsdp import gather_state, shard_optimizer_state
from .mask_options import holds_masks
from .state import Progress, Run

SAVES = 10
"""Checkpoints of a run that does not say how many."""


def choose_save_interval(config: FinetuneConfig) -> int:
    """Returns the number of images between two checkpoints."""
    return config.save_every or max(1, math.ceil(config.images / SAVES))


def save_run(run: Run) -> None:
    """Writes a checkpoint, unless it exists, and removes those no longer kept.

    Every process calls it; the main one writes. Nothing happens in a run without a folder.
    """
    folder = run.inputs.folder
    if folder is None:
        return
    run.collect_losses()
    run.masks.measure()
    tensors: dict[str, torch.Tensor] = {}
    optimizer = flatten_state(run.process.optimizer.state_dict(), "optimizer", tensors)
    losses = torch.tensor(run.progress.losses, dtype=torch.float64, device="cpu").reshape(-1, 3)
    files: dict[str, Callable[[Path], None]] = {
        "student.safetensors": prepare_student_writer(run, ema=False),
        "optimizer.safetensors": partial(save_tensors, tensors),
        "losses.safetensors": partial(save_tensors, {"losses": losses}),
    }
    if run.ema is not None:
        files["ema.safetensors"] = prepare_student_writer(run, ema=True)
    if (masks := list_held_masks(run)) and not run.frozen:
        files["masks.safetensors"] = partial(save_tensors, masks)
    if run.teacher is not None and run.teacher is not run.first_teacher:
        files["teacher.safetensors"] = partial(save_model, run.teacher)
    state = {
        **run.progress.to_json(),
        "optimizer": optimizer,
        "scaler": run.process.get_scaler_state(),
        "updates": 0 if run.ema is None else run.ema.updates,
        "masked": describe_masks(run.student),
        "frozen": run.frozen,
        "mask_scales": dict(run.mask_scales),
    }
    if run.process.is_main:
        write_checkpoint(folder, run.progress.seen, state, files)
        remove_old_checkpoints(folder, run.config.keep, find_best_checkpoint(run, folder))
    run.process.wait_for_all()


def prepare_student_writer(run: Run, *, ema: bool) -> Callable[[Path], None]:
    """Returns a function that writes the student's weights to a path, on the main process.

    ``ema``: its EMA weights, if there are any. Every process must call this: a sharded student is
    gathered now, any other is read when it is written.
    """
    average = run.ema if ema else None
    if not run.config.shard:
        return partial(save_student, run.student, average, describe_origin(run))
    with nullcontext() if average is None else average.applied():
        gathered = gather_state(run.student)
    return partial(save_gathered, run.process.template, gathered, describe_origin(run))


def describe_origin(run: Run) -> dict[str, Any]:
    """Returns where the weights are from, for the record of their file."""
    origin = {"method": run.config.method, "images": run.progress.seen}
    losses = run.progress.held_out
    return {**origin, "loss": losses[-1].final} if losses else origin


def save_student(model: nn.Module, ema: Ema | None, origin: Mapping[str, Any], path: Path) -> None:
    """Writes ``model`` with the weights of ``ema``, or with its own if that is None."""
    with nullcontext() if ema is None else ema.applied():
        save_model(model, path, origin)


def save_gathered(
    template: nn.Module | None,
    state: Mapping[str, Tensor],
    origin: Mapping[str, Any],
    path: Path,
) -> None:
    """Writes ``state`` in the form of ``template``, the model before it was sharded."""
    assert template is not None, "the main process has it"
    template.load_state_dict(dict(state))
    save_model(template, path, origin)


def find_best_checkpoint(run: Run, folder: Path) -> int | None:
    """Returns the images of the checkpoint with the lowest held-out loss, None without one."""
    saved = set(list_checkpoints(folder))
    measured = [entry for entry in run.progress.held_out if entry.images in saved]
    return min(measured, key=lambda entry: entry.final).images if measured else None


def read_last_checkpoint(run: Run, folder: Path) -> Checkpoint | None:
    """Reads the last checkpoint of the folder and sets ``run.progress``; None if there is none.

    Raises CheckpointError where it is damaged or fits another model.
    """
    saved = list_checkpoints(folder)
    if not saved:
        return None
    checkpoint = read_checkpoint(folder, saved[-1])
    try:
        run.progress = Progress.from_json(checkpoint.state, checkpoint.tensors["losses"]["losses"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint after {checkpoint.images} images in {folder} is damaged: {error!r}"
        ) from error
    return checkpoint


def restore_tensors(run: Run, checkpoint: Checkpoint) -> None:
    """Restores weights, EMA, optimizer and scaler, once the checkpoint's stage is set up.

    Raises ConfigError where the student is masked otherwise, CheckpointError where it does not fit.
    """
    load_unique_weights(run.student, checkpoint.tensors["student"])
    check_masks(run, checkpoint.state["masked"])
    if run.ema is not None:
        names = get_unique_weights(run.student)
        averages: Mapping[str, Any] = checkpoint.tensors["ema"]
        updates = checkpoint.state["updates"]
        run.ema.load_state_dict({n: averages[n] for n in names if n in averages}, updates)
    state = unflatten_state(checkpoint.state["optimizer"], checkpoint.tensors["optimizer"])
    optimizer = run.process.optimizer
    optimizer.load_state_dict(shard_optimizer_state(state, optimizer.optimizer))
    run.process.load_scaler_state(checkpoint.state["scaler"])
    run.masks.measure()


def list_held_masks(run: Run) -> dict[str, Tensor]:
    """Returns the masks that the student's weights do not tell, by name."""
    return get_masks(run.student, fixed=True) if holds_masks(run.config) else {}


def describe_masks(student: nn.Module) -> dict[str, str]:
    """Returns the pattern of every masked weight, by name."""
    if not is_compiled(student):
        return {}
    return {name: str(pattern) for name, (_, pattern) in masked_parameters(student).items()}


def check_masks(run: Run, theirs: Mapping[str, str]) -> None:
    """Raises ConfigError where the student's weights have other patterns than a checkpoint's."""
    ours = describe_masks(run.student)
    for name in sorted({*theirs, *ours}):
        before, now = theirs.get(name, "dense"), ours.get(name, "dense")
        if before != now:
            raise ConfigError(
                f"{run.inputs.folder} holds a run with {name} {before}, not {now}: compile the "
                "student with the pattern, policy, keep_dense and overrides of that run, or choose "
                "another folder"
            )
