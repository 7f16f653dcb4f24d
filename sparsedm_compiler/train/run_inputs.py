"""``RunInputs``: what a fine-tune gets besides models, optimizer and options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..diffusion.condition import Condition
    from ..diffusion.objective import NoiseScheduler
    from .batches import Data
    from .sample_grids import SampleGrids


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Data, scheduler and folder of one fine-tune; each as ``finetune`` describes it."""

    data: Data
    scheduler: NoiseScheduler | None = None
    held_out: Data | None = None
    null: Condition | None = None
    sample_grids: SampleGrids | None = None
    folder: Path | None = None
