"""What ``finetune`` returns, and how it looks on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .finetune_config import FinetuneConfig

VERSION = 1


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out losses of the student and of its average (None without one) after ``images``."""

    images: int
    student: float
    ema: float | None

    @property
    def final(self) -> float:
        """Of the average where there is one: what one would use."""
        return self.student if self.ema is None else self.ema


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """A finished fine-tune.

    ``losses``: one per step. ``images``: trained on. ``seconds``: of the loop, compiling included.
    ``ema``: a copy of the student that holds its averaged latent weights, None without averaging;
    it masks them afresh, so it is what one evaluates and saves. ``pattern``: None where dense.
    """

    config: FinetuneConfig
    losses: tuple[float, ...] = field(repr=False)
    images: int
    seconds: float
    ema: nn.Module | None = field(repr=False)
    held_out: tuple[HeldOut, ...]
    pattern: str | None = None
    processes: int = 1
    device: str = "cpu"

    def as_dict(self, name: str = "") -> dict[str, Any]:
        """Plain values for results.json: everything but the weights."""
        size = self.images / max(len(self.losses), 1)
        return {
            "version": VERSION,
            "name": name,
            "method": self.config.method,
            "pattern": self.pattern,
            "seed": self.config.seed,
            "images": self.images,
            "seconds": self.seconds,
            "images_per_second": self.images / self.seconds if self.images else 0.0,
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
