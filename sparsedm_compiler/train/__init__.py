"""The harness: fine-tune a sparse student against its dense teacher."""

from __future__ import annotations

from .config import FinetuneConfig
from .held_out import held_out_loss
from .loop import finetune
from .methods import METHODS, Method
from .pictures import Pictures
from .result import FinetuneResult, HeldOut
from .sr_ste import sr_ste
from .static import static_mask

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
