"""One-shot pruning: a model is pruned by what its layers see, without training."""

from __future__ import annotations

from .batches import CalibrationBatch
from .mixed.choose import choose_patterns
from .mixed.pattern_choice import LayerChoice, PatternChoice
from .options import OneShotOptions
from .permutation.permutation_report import PermutationReport, PermutedChannels, WeightEnergy
from .permutation.permute import permute_channels
from .prune import prune_one_shot
from .report import LayerReport, OneShotReport

__all__ = [
    "CalibrationBatch",
    "LayerChoice",
    "LayerReport",
    "OneShotOptions",
    "OneShotReport",
    "PatternChoice",
    "PermutationReport",
    "PermutedChannels",
    "WeightEnergy",
    "choose_patterns",
    "permute_channels",
    "prune_one_shot",
]
