"""When the masks of a run change: never, every k steps, by which score, and until when.

begin_masks    before the first step, and after a checkpoint was read
update_masks   before every step: freezes masks, or chooses them anew
settle_masks   after the last step, so that the weights themselves tell the masks
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from .. import (
    ConfigError,
    apply_masks,
    freeze_masks,
    hold_masks,
    masked_parameters,
    soften_masks,
    unfreeze_masks,
)
from .checkpoint import Checkpoint
from .fsdp import gather_rows
from .mask_options import holds_masks
from .optimizers import get_second_moment
from .state import Run


def begin_masks(run: Run, checkpoint: Checkpoint | None) -> None:
    """Puts the student's masks in the state in which the run goes on; it was called already."""
    config, state = run.config, {} if checkpoint is None else checkpoint.state
    if config.static_mask or state.get("frozen"):
        freeze_student(run)
    elif config.soft_threshold:
        run.mask_scales = soften_masks(run.student, state.get("mask_scales") or None)
    elif holds_masks(config) and checkpoint is not None and "masks" in checkpoint.tensors:
        hold_masks(run.student, checkpoint.tensors["masks"])


def update_masks(run: Run) -> None:
    """Freezes the masks, or chooses them anew, where the next step is due for it."""
    if run.frozen:
        return
    if is_freeze_due(run):
        freeze_student(run)
    elif (
        holds_masks(run.config)
        and run.progress.count_steps(run.pending) % run.config.mask_every == 0
    ):
        hold_masks(run.student, score_masks(run) if run.config.score == "saliency" else None)


def settle_masks(run: Run) -> None:
    """Ends held masks and soft thresholds; masks by a score of their own are frozen."""
    if run.frozen or not run.config.sparse:
        return
    if run.config.soft_threshold or run.config.score != "magnitude":
        freeze_student(run)
    elif holds_masks(run.config):
        unfreeze_masks(run.student)


def is_freeze_due(run: Run) -> bool:
    """Returns whether the share ``freeze`` of the last stage is done."""
    last, share = run.stages[-1], run.config.freeze
    if share is None or not run.config.sparse or run.progress.stage != last.number:
        return False
    return run.progress.seen >= last.first + math.ceil(share * (last.last - last.first))


def freeze_student(run: Run) -> None:
    """Keeps the student's masks as they are, in its optimizer and its EMA, too."""
    if run.ema is not None and run.config.soft_threshold and not run.frozen:
        with run.ema.edited():
            soften_weights(run)
    freeze_masks(run.student, optimizer=run.process.optimizer.optimizer)
    if run.ema is not None:
        with run.ema.edited():
            freeze_masks(run.student)
    run.frozen = True


@torch.no_grad()
def soften_weights(run: Run) -> None:
    """Writes the softly thresholded weights into the student, which goes on thresholding them."""
    twin = copy.deepcopy(run.student)
    apply_masks(twin)
    for weight, soft in zip(run.student.parameters(), twin.parameters(), strict=True):
        weight.copy_(soft)


@torch.no_grad()
def score_masks(run: Run) -> dict[str, Tensor]:
    """Returns the masks of largest ``w^2 E[g^2]``; before the first step those of magnitudes.

    It estimates what removing a weight costs: half of it is the second-order term of OBD (LeCun et
    al. 1990) with the empirical Fisher information ``E[g^2]`` as Hessian (Theis et al. 2018).
    ``E[g^2]`` is Adam's second moment. Raises ConfigError for an optimizer that has none.
    """
    state: dict[Any, Any] = run.process.optimizer.optimizer.state
    masks = {}
    for name, (weight, pattern) in masked_parameters(run.student).items():
        values, own = gather_rows(weight.detach()), state.get(weight, {})
        second = get_second_moment(own)
        if own and second is None:
            raise ConfigError(
                f"score 'saliency' needs Adam's second moment, which "
                f"{type(run.process.optimizer.optimizer).__name__} does not keep"
            )
        if second is not None:
            moment = gather_rows(second).to(values)
            values = values * moment.sqrt() if bool(moment.any()) else values
        masks[name] = pattern.compute_mask(values)
    return masks
