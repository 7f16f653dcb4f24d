"""``SampleGrids``: the grids of samples that a run draws while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..option_values import check_seed, check_whole
from ..optional_deps import require_extra

if TYPE_CHECKING:
    from ..diffusion.condition import Condition
    from ..diffusion.guidance import Guidance
    from .batches import Data

OWNER = " of sample grids"


@dataclass(frozen=True, slots=True)
class SampleGrids:
    """Samples from fixed seeds, shown as a grid.

    Attributes:
        shape: [C, H, W] of one sample, as the model makes it.
        count: How many samples.
        columns: Samples per row of the grid.
        sampler: The sampler, as ``diffusion.make_scheduler`` names it.
        steps: Sampling steps.
        seed: The seed; sample i is drawn from (seed, i) alone.
        condition: The condition of all samples, one row per sample, e.g. class labels [count].
            None is for models without a condition.
        guidance: Classifier-free guidance; None samples without.
        decode: Turns latents into images; None where the model makes images.
        batch_size: Samples that are drawn at once.

    Raises:
        ConfigError: ``count``, ``columns``, ``steps`` or ``batch_size`` is no whole number >= 1, or
            ``seed`` is none of torch.
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
    batch_size: int = 256

    def __post_init__(self) -> None:
        counts = {"count": self.count, "columns": self.columns, "steps": self.steps}
        for name, value in {**counts, "batch_size": self.batch_size}.items():
            check_whole(name, value, least=1, owner=OWNER)
        check_seed("seed", self.seed, owner=OWNER)

    def draw(
        self, model: nn.Module, objective: str, *, betas: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Draws the samples of ``model``.

        Args:
            model: The model to sample from.
            objective: The objective that the model was trained for, e.g. "eps".
            betas: The noise levels that it was trained with, as for ``make_scheduler``.

        Returns:
            The images [count, C, H, W] in [-1, 1].

        Raises:
            ConfigError: Sampler and objective do not go together, or a package of the extra
                "train" is not installed.
            DataError: A sample holds NaN or Inf.
        """
        with require_extra("SampleGrids", "train"):
            from ..diffusion.sampling import sample
            from ..diffusion.schedulers import make_scheduler
        return sample(
            model,
            make_scheduler(self.sampler, objective, betas=betas),
            shape=(self.count, *self.shape),
            steps=self.steps,
            seed=self.seed,
            condition=self.condition,
            guidance=self.guidance,
            decode=self.decode,
            batch_size=self.batch_size,
            progress=False,
        )

    def save(self, path: Path, images: Tensor) -> None:
        """Writes images as one grid, a PNG.

        Args:
            path: The file to write; its folder is made.
            images: [n, C, H, W] in [-1, 1], e.g. what ``draw`` returned.

        Raises:
            ConfigError: A package of the extra "train" is not installed.
        """
        from ..reporting.grid import save_grid

        rows = [*torch.split(images, self.columns)]
        rows[-1] = torch.cat(
            [rows[-1], images.new_ones(self.columns - len(rows[-1]), *images.shape[1:])]
        )
        scale = max(1, 64 // images.shape[-1])
        save_grid(path, {str(k * self.columns): row for k, row in enumerate(rows)}, scale=scale)


def check_grids(
    grids: SampleGrids, objective: str, *, betas: Mapping[str, Any] | None = None
) -> None:
    """Raises ConfigError or DataError where ``grids`` cannot be drawn of a model.

    Of it ``objective`` and ``betas`` are known, as for ``draw``. Sampler, steps, shape, condition
    and guidance are checked, so that a run need not train first to be refused.
    """
    from ..diffusion.sampling import SamplePlan
    from ..diffusion.schedulers import check_steps, make_scheduler

    shape = (grids.count, *grids.shape)
    SamplePlan(shape, grids.steps, condition=grids.condition, guidance=grids.guidance)
    check_steps(make_scheduler(grids.sampler, objective, betas=betas), grids.steps)


def save_real_images(
    grids: SampleGrids,
    path: Path,
    data: Data,
    held_out: Data | None,
    device: torch.device | None = None,
) -> None:
    """Writes as many images of the data as a grid of samples has, from all over the data.

    They are held-out images where there are any. Latents are decoded. Of data that can only be
    iterated nothing is written.

    Args:
        grids: The grids that they are compared with.
        path: The file to write, a PNG.
        data: The data, as ``finetune`` takes them.
        held_out: The held-out data, likewise; None for none.
        device: Where ``decode`` takes samples; None: where the data lie.
    """
    from .batches import check_batch, index_data

    indexed = index_data(data if held_out is None else held_out)
    if indexed is None:
        return
    size, fetch = indexed
    count = min(grids.count, size)
    images, _ = check_batch(fetch([k * size // count for k in range(count)]))
    if grids.decode is not None:
        images = grids.decode(images if device is None else images.to(device)).cpu()
    grids.save(path, images)
