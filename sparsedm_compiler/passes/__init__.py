"""The passes. ``REWRITES`` is the only statement of their order."""

from .carry_features import carry_features
from .count_macs import count_macs
from .find_sites import eager_sites, find_sites
from .find_uses import find_uses
from .insert_mask_ste import insert_mask_ste
from .lower_sparse import lower_sparse
from .mark_prunable import mark_eager, mark_prunable
from .pad_tokens import pad_tokens
from .topology import topology
from .train_sparse import train_sparse

REWRITES = (insert_mask_ste,)

__all__ = [
    "REWRITES",
    "carry_features",
    "count_macs",
    "eager_sites",
    "find_sites",
    "find_uses",
    "insert_mask_ste",
    "lower_sparse",
    "mark_eager",
    "mark_prunable",
    "pad_tokens",
    "topology",
    "train_sparse",
]
