"""``Pictures``: the sample grids a run draws while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion.condition import Condition
from ..diffusion.guidance import Guidance
from ..diffusion.sampling import sample
from ..diffusion.schedulers import make_scheduler
from ..reporting.grid import save_grid


@dataclass(frozen=True, slots=True)
class Pictures:
    """Samples at fixed seeds: ``shape`` of one image, ``columns`` beside each other.

    ``condition``: one row per image, e.g. class labels. ``sampler``: as ``make_scheduler`` names
    it. ``decode``: latents -> images.
    """

    shape: tuple[int, ...]
    count: int = 40
    columns: int = 10
    sampler: str = "dpm++"
    steps: int = 20
    seed: int = 0
    condition: Condition | None = None
    guidance: Guidance | None = None
    decode: Callable[[Tensor], Tensor] | None = None

    def draw(self, model: nn.Module, objective: str) -> Tensor:
        """The samples of ``model`` [count, C, H, W]."""
        return sample(
            model,
            make_scheduler(self.sampler, objective),
            shape=(self.count, *self.shape),
            steps=self.steps,
            seed=self.seed,
            condition=self.condition,
            guidance=self.guidance,
            decode=self.decode,
            progress=False,
        )

    def save(self, path: Path, images: Tensor) -> None:
        """Write the samples as one grid."""
        rows = [*torch.split(images, self.columns)]
        rows[-1] = torch.cat(
            [rows[-1], images.new_ones(self.columns - len(rows[-1]), *images.shape[1:])]
        )
        scale = max(1, 64 // images.shape[-1])
        save_grid(path, {str(k * self.columns): row for k, row in enumerate(rows)}, scale=scale)
