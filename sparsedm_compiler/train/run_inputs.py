"""``RunInputs``: what a fine-tune gets besides models, optimizer and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..diffusion.condition import Condition
    from ..diffusion.objective import NoiseScheduler
    from .batches import Data
    from .fingerprints import Fingerprints
    from .sample_grids import SampleGrids


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Data, scheduler and folder of one fine-tune; each as ``finetune`` describes it.

    ``prints``: fingerprints of all inputs, with which alone the folder is resumed. ``known``: those
    of "teacher" and "data", where they have been computed. ``settings``: further files, name and
    text, to write into the folder once the run begins.
    """

    data: Data
    scheduler: NoiseScheduler | None = None
    held_out: Data | None = None
    null: Condition | None = None
    sample_grids: SampleGrids | None = None
    folder: Path | None = None
    prints: Fingerprints = field(default_factory=dict)
    known: Fingerprints = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def betas(self) -> Mapping[str, Any] | None:
        """The noise levels of the scheduler, as ``make_scheduler`` takes them; None without one."""
        from ..diffusion.schedulers import get_betas

        return None if self.scheduler is None else get_betas(self.scheduler.config)
