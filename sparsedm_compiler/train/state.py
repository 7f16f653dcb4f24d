"""``Run``: what a fine-tune works with, and ``Progress``: how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import SparseDMError
from ..diffusion.condition import Condition
from ..diffusion.objective import Objective
from .batches import Data
from .distributed import Engine
from .ema import Average
from .finetune_config import FinetuneConfig
from .result import HeldOut
from .run_log import Logbook, MaskWatch
from .sample_grids import Pictures
from .stages import Stage


@dataclass(slots=True)
class Progress:
    """Everything that changes during a run besides tensors of the models; saved as JSON.

    ``losses``: per step (total, noise, teacher). ``logged``: how many of them the log has.
    ``stage``: the one that has begun. ``best``: images of the checkpoint with the lowest held-out
    loss.
    """

    seen: int = 0
    stage: int = 0
    losses: list[list[float]] = field(default_factory=list)
    logged: int = 0
    held_out: list[HeldOut] = field(default_factory=list)
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """Values for JSON; ``losses`` go elsewhere."""
        held = [[entry.images, entry.student, entry.ema] for entry in self.held_out]
        return {
            "images": self.seen,
            "stage": self.stage,
            "logged": self.logged,
            "held_out": held,
            "seconds": self.seconds,
        }

    @staticmethod
    def of(plain: Mapping[str, Any], losses: Tensor) -> Progress:
        """What ``plain`` and the losses [steps, 3] were made from."""
        return Progress(
            plain["images"],
            plain["stage"],
            losses.tolist(),
            plain["logged"],
            [HeldOut(*entry) for entry in plain["held_out"]],
            plain["seconds"],
        )


@dataclass(slots=True)
class Run:
    """One fine-tune; ``given``: the teacher as given, ``teacher``: that of the present stage."""

    config: FinetuneConfig
    student: nn.Module
    given: nn.Module | None
    teacher: nn.Module | None
    objective: Objective
    scheduler: Any
    engine: Engine
    stages: tuple[Stage, ...]
    data: Data
    held_out: Data | None
    null: Condition | None
    pictures: Pictures | None
    folder: Path | None
    lrs: list[float]
    average: Average | None
    watch: MaskWatch
    progress: Progress = field(default_factory=Progress)
    book: Logbook | None = None
    pending: list[Tensor] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        """The stage that has begun."""
        return self.stages[self.progress.stage]

    def add_loss(self, terms: Tensor) -> None:
        """Note the loss terms [3] of this process's part of a step.

        On the CPU they are looked at now, elsewhere when ``drain`` is called, so that the device
        need not be waited for at every step.
        """
        self.pending.append(terms)
        if terms.device.type == "cpu":
            self.drain()

    def drain(self) -> None:
        """Bring all losses here, averaged over processes. Raises SparseDMError for NaN and Inf."""
        if not self.pending:
            return
        found = self.engine.mean(torch.stack(self.pending))
        self.pending = []
        if not found.isfinite().all():
            value = found[~found.isfinite().all(dim=1)][0, 0].item()
            raise SparseDMError(
                f"the loss is {value} after {self.progress.seen} images: check the data for NaN, "
                f"lower lr or set max_grad_norm; {self.safe()}"
            )
        self.progress.losses += found.tolist()

    def safe(self) -> str:
        """Where the last good weights are, in words."""
        if self.folder is not None:
            return f"the last checkpoint in {self.folder / 'checkpoints'} is from before"
        if next(self.student.parameters()).device.type == "cpu":
            return "the student holds the weights of the step before"
        return "the student's weights are lost; out= keeps checkpoints"
