"""The training harness: fine-tunes a sparse student against its dense teacher.

Importing it needs no optional package; ``finetune``, ``held_out_loss`` and ``SampleGrids`` need the
extra "train" when they are called.
"""

from __future__ import annotations

from .calibration import make_calibration_batches
from .finetune_config import FinetuneConfig
from .finetuning import finetune
from .methods import METHODS, Method
from .result import FinetuneResult, HeldOutLoss
from .sample_grids import SampleGrids
from .sr_ste import sr_ste
from .validation import held_out_loss

__all__ = [
    "METHODS",
    "FinetuneConfig",
    "FinetuneResult",
    "HeldOutLoss",
    "Method",
    "SampleGrids",
    "finetune",
    "held_out_loss",
    "make_calibration_batches",
    "sr_ste",
]
