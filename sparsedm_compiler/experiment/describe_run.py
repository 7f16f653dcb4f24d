"""The opening table of a run: what is trained on what, from which weights, on which devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..data import ImageData
from ..evaluate.process_group import join_process_group
from ..models.loading import OWN_WEIGHTS, is_function
from ..train.checkpoint import list_checkpoints
from ..train.methods import find_method
from .inputs import OpenedInputs
from .opened_run import OpenedRun
from .run_config import RunConfig

FLOPS = {"cpu": 5e10, "cuda": 1e13}
"""What a device computes in a second of training, roughly and rather less than more."""
COMPILE_SECONDS = 60
"""What Inductor takes to compile a small model for training the first time, and more."""


def format_description(config: RunConfig, opened: OpenedRun) -> str:
    """Returns the text of ``describe`` for a run that is open."""
    inputs, macs = opened.inputs, opened.macs
    parameters = sum(parameter.numel() for parameter in opened.teacher.parameters())
    train, folder = config.train, Path(config.out)
    saved = list_checkpoints(folder)
    pattern = config.prune.pattern if train.sparse else "none, dense"
    state = f"resumed after {saved[-1]:,} of them" if saved else "a new run"
    lines = [
        f"model      {config.model.name}, {parameters:,} parameters, {describe_weights(config)}",
        f"method     {train.method}: {find_method(train.method).about}",
        f"pattern    {pattern}, MACs {macs['dense']:,} -> {macs['sparse']:,} "
        f"(attention {macs['attention']:,})",
        f"data       {describe_data(config.data.train, inputs.data)}",
        f"held out   {describe_held_out(config, inputs)}",
        f"training   {train.images:,} images in batches of {train.batch_size}, objective "
        f"{train.objective}; {state}",
        f"device     {describe_processes()}",
        *([f"backend    {describe_backend(config, macs)}"] if train.sparse else []),
        f"score      {config.score.network or 'none'}",
        f"folder     {folder}",
    ]
    return "\n".join(lines)


def describe_weights(config: RunConfig) -> str:
    """Says where the weights of the dense model come from."""
    name, weights = config.model.name, config.model.weights
    if weights is not None:
        return f"weights {weights}"
    if is_function(name):
        return "the weights that this function returns"
    if Path(name).is_dir() and any(Path(name).glob(OWN_WEIGHTS)):
        return f"the weights in {name}"
    return f"random weights of seed {config.train.seed}"


def describe_data(spec: str, data: ImageData) -> str:
    """Says how many images of which shape a source holds, and of how many classes."""
    classes = "no labels" if data.classes is None else f"{data.classes} classes"
    return "; ".join(
        [f"{len(data):,} images {list(data.shape)} from {spec}, {classes}", *data.notes]
    )


def describe_held_out(config: RunConfig, inputs: OpenedInputs) -> str:
    """Says which images are held out."""
    if config.data.held_out is None or inputs.held_out is None:
        return "none: no held-out loss (set data.held_out)"
    return describe_data(config.data.held_out, inputs.held_out)


def describe_backend(config: RunConfig, macs: Mapping[str, int]) -> str:
    """Says what compiles the student, with advice where that may take longer than the run.

    A step multiplies about four times as often as one forward of student and teacher.
    """
    name: str = config.prune.backend
    flops = FLOPS.get(join_process_group().device.type, FLOPS["cuda"])
    seconds = 8 * macs["dense"] * config.train.images / flops
    if name == "eager" or seconds > COMPILE_SECONDS:
        return name
    return f"{name}; a run this short may end sooner without compiling: --set prune.backend=eager"


def describe_processes() -> str:
    """Says how many processes train on which devices."""
    state = join_process_group()
    count = state.num_processes
    text = f"{count} process{'es' if count > 1 else ''} on {state.device.type}"
    if count == 1 and "ACCELERATE_USE_CPU" in os.environ:
        text += (
            " (accelerate launch --cpu starts one, whatever --num_processes says; torchrun "
            "--nproc-per-node starts several)"
        )
    return text
