"""N:M sparsity patterns: one final class for each kind, parsed from strings such as "2:4"."""

from __future__ import annotations

from .blocks import BlockNM, NestedNM
from .pattern import Pattern, register_pattern, unregister_pattern
from .per_row import NM
from .shared_rows import SharedNM
from .transposable import TransposableNM
from .vnm import VNM

__all__ = [
    "NM",
    "VNM",
    "BlockNM",
    "NestedNM",
    "Pattern",
    "SharedNM",
    "TransposableNM",
    "register_pattern",
    "unregister_pattern",
]
