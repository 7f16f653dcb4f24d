"""Files of sparse weights, dense with zeros or compact (docs/reference/format.md)."""

from __future__ import annotations

from .check_file import FileReport, WeightRow, check_file
from .compact import CompactWeight, count_compact_bytes
from .convert import convert_file
from .model_card import make_model_card
from .pruned import PrunedRow, PrunedWeights, read_pruned

__all__ = [
    "CompactWeight",
    "FileReport",
    "PrunedRow",
    "PrunedWeights",
    "WeightRow",
    "check_file",
    "convert_file",
    "count_compact_bytes",
    "make_model_card",
    "read_pruned",
]
