"""From one stage of a run to the next."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import Pattern, repattern
from .checkpoint import put_weights
from .ema import Average
from .state import Run


def set_up_stage(run: Run, teacher: Mapping[str, Tensor] | None) -> None:
    """Pattern and teacher of the stage that ``run.progress`` is in.

    ``teacher``: the weights of a teacher that is an earlier student, from a checkpoint.
    """
    if run.config.staged:
        prune_to(run.student, run.stage.pattern)
    run.teacher = run.given
    if teacher is not None:
        run.teacher = frozen(run.student)
        prune_to(run.teacher, run.stages[run.stage.number - 1].pattern)
        put_weights(run.teacher, teacher)


def begin_stage(run: Run) -> None:
    """Go over to the next stage: its pattern, and with teacher "previous" a fresh start.

    There the student so far, averaged, becomes the teacher and the start of the next student; the
    optimizer and the average begin anew.
    """
    if run.config.teacher == "previous":
        if run.average is not None:
            run.average.put()
        run.teacher = frozen(run.student)
        run.engine.optimizer.optimizer.state.clear()
        if run.average is not None:
            run.average = Average(run.student, run.average.decay)
    run.progress.stage += 1
    prune_to(run.student, run.stage.pattern)


def prune_to(model: nn.Module, pattern: Pattern | None) -> None:
    """Prune ``model`` to the pattern of a stage of a staged run."""
    assert pattern is not None
    repattern(model, pattern)


def frozen(student: nn.Module) -> nn.Module:
    """A copy of ``student``, masked as it is now, that only teaches."""
    with torch.no_grad():
        return copy.deepcopy(student).eval().requires_grad_(False)
