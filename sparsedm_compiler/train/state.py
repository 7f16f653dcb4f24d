"""``Run``: everything a fine-tune works with, and ``Progress``: how far it has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import SparseDMError
from ..data.row_cache import RowCache
from ..diffusion.objective import Objective
from .checkpoint import list_checkpoints
from .distributed import TrainingProcess
from .ema import Ema
from .finetune_config import FinetuneConfig
from .result import HeldOutLoss
from .run_inputs import RunInputs
from .run_log import MaskWatch, RunLog
from .stages import Stage
from .step_clock import StepClock

RATES = 1000
"""The steps whose rates a checkpoint keeps."""


@dataclass(slots=True)
class Progress:
    """Everything that changes during a run besides tensors of the models; saved as JSON.

    ``seen``: images trained on. ``stage``: number of the current one. ``losses``: per step (total,
    noise, teacher). ``logged``: how many of them the log has. ``seconds``: spent in steps and
    waiting for data; ``compile_seconds``: spent compiling them. ``rates``: images per second of
    the last steps.
    """

    seen: int = 0
    stage: int = 0
    losses: list[list[float]] = field(default_factory=list)
    logged: int = 0
    held_out: list[HeldOutLoss] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    rates: list[float] = field(default_factory=list)

    def count_steps(self, pending: Sequence[Tensor] = ()) -> int:
        """Returns the steps taken; ``pending``: losses that are still on the device."""
        return len(self.losses) + len(pending)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON, without ``losses``, which are saved as a tensor."""
        held = [[entry.images, entry.student, entry.ema] for entry in self.held_out]
        return {
            "images": self.seen,
            "stage": self.stage,
            "logged": self.logged,
            "held_out": held,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "rates": self.rates[-RATES:],
        }

    @staticmethod
    def from_json(plain: Mapping[str, Any], losses: Tensor) -> Progress:
        """Returns the progress that ``to_json`` made ``plain`` from, with losses [steps, 3]."""
        return Progress(
            plain["images"],
            plain["stage"],
            losses.tolist(),
            plain["logged"],
            [HeldOutLoss(*entry) for entry in plain["held_out"]],
            plain["seconds"],
            plain["compile_seconds"],
            plain["rates"],
        )


@dataclass(slots=True)
class Run:
    """One fine-tune while it runs.

    ``first_teacher``: the teacher that ``finetune`` got; ``teacher``: that of the current stage.
    ``lrs``: the learning rate of each group of the optimizer, before the schedule. ``log``: on the
    main process of a run with a folder. ``pending``: losses that are still on the device.
    ``clock``: times the steps. ``recent_rates``: images per second of the steps since the last line
    of the log. ``frozen``: whether the masks do not change any more. ``mask_scales``: the scales of
    S-STE's soft thresholds. ``teacher_cache``: where the teacher's outputs are kept;
    ``teacher_compared``: whether one of them was compared with the teacher.
    """

    config: FinetuneConfig
    inputs: RunInputs
    student: nn.Module
    first_teacher: nn.Module | None
    teacher: nn.Module | None
    objective: Objective
    process: TrainingProcess
    stages: tuple[Stage, ...]
    lrs: list[float]
    ema: Ema | None
    masks: MaskWatch
    progress: Progress = field(default_factory=Progress)
    log: RunLog | None = None
    pending: list[Tensor] = field(default_factory=list)
    clock: StepClock = field(default_factory=StepClock)
    recent_rates: list[float] = field(default_factory=list)
    frozen: bool = False
    mask_scales: Mapping[str, float] = field(default_factory=dict)
    teacher_cache: RowCache | None = None
    teacher_compared: bool = False

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.stages[self.progress.stage]

    def stop_clock(self) -> None:
        """Waits for the steps since the last call and records their time."""
        self.collect_losses()
        lap, state = self.clock.stop(), self.progress
        state.seconds += lap.seconds
        state.compile_seconds += lap.compiling
        if lap.rate is not None:
            state.rates.append(lap.rate)
            self.recent_rates.append(lap.rate)

    def add_loss(self, terms: Tensor) -> None:
        """Records the loss terms [3] of this process's part of a step.

        On the CPU they are checked now, elsewhere when ``collect_losses`` is called, so that no
        step waits for the device.
        """
        self.pending.append(terms)
        if terms.device.type == "cpu":
            self.collect_losses()

    def collect_losses(self) -> None:
        """Moves pending losses into ``progress``, averaged over processes.

        Raises SparseDMError for NaN and Inf.
        """
        if not self.pending:
            return
        losses = self.process.average(torch.stack(self.pending))
        self.pending = []
        if not losses.isfinite().all():
            value = losses[~losses.isfinite().all(dim=1)][0, 0].item()
            raise SparseDMError(
                f"the loss is {value} after {self.progress.seen} images: check the data for NaN, "
                f"lower lr or set max_grad_norm; {self._describe_good_weights()}"
            )
        self.progress.losses += losses.tolist()

    def _describe_good_weights(self) -> str:
        """Returns the end of a message: where the last good weights are."""
        folder = self.inputs.folder
        if folder is not None and not list_checkpoints(folder):
            return f"no checkpoint has been saved in {folder} yet"
        if folder is not None:
            return f"the last checkpoint in {folder / 'checkpoints'} is from before"
        if next(self.student.parameters()).device.type == "cpu":
            return "the student holds the weights of the step before"
        return "the student's weights are lost; out= keeps checkpoints"
