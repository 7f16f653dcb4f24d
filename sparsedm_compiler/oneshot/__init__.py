"""One-shot pruning: a model is pruned by what its layers see, without training."""

from __future__ import annotations

from .batches import CalibrationBatch
from .options import OneShotOptions
from .prune import prune_one_shot
from .report import LayerReport, OneShotReport

__all__ = [
    "CalibrationBatch",
    "LayerReport",
    "OneShotOptions",
    "OneShotReport",
    "prune_one_shot",
]
