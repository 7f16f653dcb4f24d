"""The harness: fine-tune a sparse student against its dense teacher."""

from __future__ import annotations

from .finetune_config import FinetuneConfig
from .fixed_mask import static_mask
from .loop import finetune
from .methods import METHODS, Method
from .result import FinetuneResult, HeldOut
from .sample_grids import Pictures
from .sr_ste import sr_ste
from .validation import held_out_loss

__all__ = [
    "METHODS",
    "FinetuneConfig",
    "FinetuneResult",
    "HeldOut",
    "Method",
    "Pictures",
    "finetune",
    "held_out_loss",
    "sr_ste",
    "static_mask",
]
