"""``FinetuneResult``: the outcome of ``finetune``, and its form on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .finetune_config import FinetuneConfig

VERSION = 1


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Held-out losses after a number of training images.

    Attributes:
        images: Images trained on before.
        student: The loss of the student's own weights.
        ema: The loss of the EMA weights; None without EMA.
    """

    images: int
    student: float
    ema: float | None

    @property
    def final(self) -> float:
        """The loss of the EMA weights if there are any, else of the student's own."""
        return self.student if self.ema is None else self.ema


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """A finished fine-tune.

    Attributes:
        config: The options of the run.
        losses: The total loss of every step.
        images: Images trained on, epochs and all.
        seconds: Time spent in steps and waiting for data, over all resumed parts of the run; not
            compiling, measuring, sampling and saving.
        ema: A copy of the student that holds the EMA of its latent weights and masks them in every
            forward: the model to evaluate and save. None without EMA, and for sharded runs.
        held_out: Held-out losses, in the order they were measured.
        pattern: The student's pattern as text, e.g. "2:4"; None if it is dense.
        processes: Number of processes that trained together.
        device: Type of the device, "cpu" or "cuda".
        compile_seconds: Time spent compiling the training step.
        images_per_second: Median rate of the steps that were not compiled first.
    """

    config: FinetuneConfig
    losses: tuple[float, ...] = field(repr=False)
    images: int
    seconds: float
    ema: nn.Module | None = field(repr=False)
    held_out: tuple[HeldOutLoss, ...]
    pattern: str | None = None
    processes: int = 1
    device: str = "cpu"
    compile_seconds: float = 0.0
    images_per_second: float = 0.0

    def as_dict(self, name: str = "") -> dict[str, Any]:
        """Returns plain values for results.json: everything but the weights.

        Args:
            name: The name of the run, by default empty.

        Returns:
            A dict of JSON values; "macs", "scores", "speed" and "samples" are left to fill in.
        """
        size = self.images / max(len(self.losses), 1)
        return {
            "version": VERSION,
            "name": name,
            "method": self.config.method,
            "pattern": self.pattern,
            "seed": self.config.seed,
            "images": self.images,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "images_per_second": self.images_per_second,
            "config": self.config.as_dict(),
            "held_out": [asdict(entry) for entry in self.held_out],
            "losses": {
                "images": [round(size * (step + 1)) for step in range(len(self.losses))],
                "loss": list(self.losses),
            },
            "macs": None,
            "scores": [],
            "speed": None,
            "samples": None,
            "machine": {
                "torch": torch.__version__,
                "device": self.device,
                "threads": torch.get_num_threads(),
                "processes": self.processes,
            },
        }
