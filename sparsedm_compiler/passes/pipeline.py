"""Run the rewrites on a graph, then clean up, check and recompile it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ..masks.mask_ste import mask_ste_op
from ..patterns import Pattern
from . import REWRITES
from .verify import verify


def run_rewrites(gm: fx.GraphModule, patterns: Mapping[fx.Node, Pattern]) -> int:
    """How many changes the rewrites made; with none the graph's code is as it was."""
    changes = sum(rewrite(gm, patterns) for rewrite in REWRITES)
    if changes:
        # Only our own nodes: in-place ops of the model have no users and must stay.
        gm.graph.eliminate_dead_code(lambda node: node.target is not mask_ste_op)
        gm.recompile()
    verify(gm, patterns)
    return changes
