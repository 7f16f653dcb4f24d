"""The harness: fine-tune a sparse student against its dense teacher."""

from __future__ import annotations

from .config import FinetuneConfig
from .held_out import held_out_loss
from .loop import finetune
from .result import FinetuneResult, HeldOut
from .sr_ste import sr_ste

__all__ = ["FinetuneConfig", "FinetuneResult", "HeldOut", "finetune", "held_out_loss", "sr_ste"]
