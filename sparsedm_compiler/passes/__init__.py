"""The passes. ``REWRITES`` is the only statement of their order."""

from .count_macs import count_macs
from .find_sites import eager_sites, find_sites
from .insert_mask_ste import insert_mask_ste
from .mark_prunable import mark_eager, mark_prunable
from .topology import topology

REWRITES = (insert_mask_ste,)

__all__ = [
    "REWRITES",
    "count_macs",
    "eager_sites",
    "find_sites",
    "insert_mask_ste",
    "mark_eager",
    "mark_prunable",
    "topology",
]
