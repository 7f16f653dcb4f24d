"""The passes. ``REWRITES`` is the only statement of their order."""

from .analysis.count_macs import count_macs
from .analysis.find_sites import find_eager_sites, find_sites
from .analysis.find_uses import find_uses
from .analysis.mark_prunable import mark_eager, mark_prunable
from .analysis.topology import trace_topology
from .rewrite.carry_features import carry_features
from .rewrite.insert_mask_ste import insert_mask_ste
from .rewrite.lower_sparse import lower_sparse
from .rewrite.pad_tokens import pad_tokens
from .rewrite.train_sparse import train_sparse

REWRITES = (insert_mask_ste,)

__all__ = [
    "REWRITES",
    "carry_features",
    "count_macs",
    "find_eager_sites",
    "find_sites",
    "find_uses",
    "insert_mask_ste",
    "lower_sparse",
    "mark_eager",
    "mark_prunable",
    "pad_tokens",
    "trace_topology",
    "train_sparse",
]
