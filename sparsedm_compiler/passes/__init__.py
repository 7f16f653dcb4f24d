"""The passes. ``TRAIN`` and ``INFER`` are the only statements of the order of rewrites."""

from __future__ import annotations

from .analysis.count_macs import count_macs
from .analysis.find_repeated_blocks import (
    Block,
    BlockGroup,
    find_repeated_blocks,
    make_block,
)
from .analysis.find_sites import (
    COMPUTED,
    Site,
    Sites,
    find_product_sites,
    find_recorded_sites,
    find_sites,
)
from .analysis.find_uses import find_uses
from .analysis.mark_prunable import ADDED, decide_weight, mark_prunable, may_be_pruned
from .analysis.topology import trace_topology
from .outline_blocks import extract_graph, outline_blocks
from .pipeline import INFER, TRAIN, run_passes
from .planned_weight import KernelTimes, Plan, PlannedWeight, Refusal, Status, WeightUse

__all__ = [
    "ADDED",
    "COMPUTED",
    "INFER",
    "TRAIN",
    "Block",
    "BlockGroup",
    "KernelTimes",
    "Plan",
    "PlannedWeight",
    "Refusal",
    "Site",
    "Sites",
    "Status",
    "WeightUse",
    "count_macs",
    "decide_weight",
    "extract_graph",
    "find_product_sites",
    "find_recorded_sites",
    "find_repeated_blocks",
    "find_sites",
    "find_uses",
    "make_block",
    "mark_prunable",
    "may_be_pruned",
    "outline_blocks",
    "run_passes",
    "trace_topology",
]
