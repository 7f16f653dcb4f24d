"""The switch from one stage of a run to the next."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import Pattern, freeze_masks, repattern
from .checkpoint import load_unique_weights
from .ema import Ema
from .mask_options import chooses_masks, holds_masks
from .mask_schedule import begin_masks
from .session import capture_student
from .state import Run


def set_up_stage(run: Run, teacher: Mapping[str, Tensor] | None) -> None:
    """Sets pattern and teacher of the stage that ``run.progress`` is in.

    ``teacher``: the weights of a teacher that is an earlier student, from a checkpoint.
    """
    if run.config.staged:
        prune_to(run.student, run.stage.pattern)
    run.teacher = run.first_teacher
    if teacher is not None:
        run.teacher = copy_frozen(run.student)
        prune_to(run.teacher, run.stages[run.stage.number - 1].pattern)
        load_unique_weights(run.teacher, teacher)


def begin_stage(run: Run) -> None:
    """Begins the next stage: its pattern, and with teacher "previous" a fresh start.

    There the student's EMA becomes the teacher and the start of the next student; optimizer state
    and EMA begin anew.
    """
    if run.config.teacher == "previous":
        if run.ema is not None:
            run.ema.copy_to_model()
        run.teacher = copy_frozen(run.student)
        if holds_masks(run.config) or run.config.soft_threshold:
            freeze_masks(run.teacher)  # so that its weights tell its masks, in a file too
        run.process.optimizer.optimizer.state.clear()
        if run.ema is not None:
            run.ema = Ema(run.student, run.ema.decay)
    run.progress.stage += 1
    prune_to(run.student, run.stage.pattern)
    if chooses_masks(run.config):
        capture_student(run)
        begin_masks(run, None)


def prune_to(model: nn.Module, pattern: Pattern | None) -> None:
    """Prunes ``model`` to the pattern of a stage of a staged run."""
    assert pattern is not None
    repattern(model, pattern)


def copy_frozen(student: nn.Module) -> nn.Module:
    """Returns a copy of ``student`` in eval mode, with its current masks, without gradients."""
    with torch.no_grad():
        return copy.deepcopy(student).eval().requires_grad_(False)
