"""Files of sparse weights, dense with zeros or compact (docs/reference/format.md)."""

from __future__ import annotations

from .compact import CompactWeight, count_compact_bytes

__all__ = [
    "CompactWeight",
    "FileReport",
    "WeightRow",
    "check_file",
    "convert_file",
    "count_compact_bytes",
]
