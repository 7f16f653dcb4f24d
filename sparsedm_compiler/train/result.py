"""What ``finetune`` returns, and how it looks on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .config import FinetuneConfig


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out losses of the student and of its average (None without one) after ``images``."""

    images: int
    student: float
    ema: float | None


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """A finished fine-tune.

    ``losses``: one per step. ``images``: trained on. ``seconds``: of the loop, compiling included.
    ``ema``: a copy of the student that holds its averaged latent weights, None without averaging;
    it masks them afresh, so it is what one evaluates and saves.
    """

    config: FinetuneConfig
    losses: tuple[float, ...] = field(repr=False)
    images: int
    seconds: float
    ema: nn.Module | None = field(repr=False)
    held_out: tuple[HeldOut, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: everything but the weights."""
        return {
            "config": self.config.as_dict(),
            "images": self.images,
            "seconds": self.seconds,
            "held_out": [asdict(entry) for entry in self.held_out],
            "losses": list(self.losses),
        }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write ``values`` at ``path``, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
