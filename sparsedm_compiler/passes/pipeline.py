"""The one way to rewrite a graph: the passes of a mode in their order, clean up, verify."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ..masks.mask_ste import mask_ste_op
from .planned_weight import Plan
from .rewrite.carry_features import carry_features
from .rewrite.fuse_norms import fuse_norms
from .rewrite.insert_frozen_masks import insert_frozen_masks
from .rewrite.insert_held_masks import insert_held_masks
from .rewrite.insert_mask_ste import insert_mask_ste
from .rewrite.lower_sparse import lower_sparse
from .rewrite.pad_tokens import pad_tokens
from .rewrite.round_rows import round_rows
from .rewrite.train_sparse import train_sparse
from .verify import verify_folded, verify_masked

Rewrite = Callable[[fx.GraphModule, Plan], int]
"""Edits a graph as planned and returns the number of changes; 0 leaves it as it was."""

TRAIN: tuple[Rewrite, ...] = (
    insert_frozen_masks,
    insert_held_masks,
    insert_mask_ste,
    train_sparse,
)
"""The rewrites of mode "train", in order."""

INFER: tuple[Rewrite, ...] = (lower_sparse, fuse_norms, round_rows, carry_features, pad_tokens)
"""The rewrites of mode "infer", in order."""


def run_passes(gm: fx.GraphModule, plan: Plan, mode: str) -> int:
    """Runs the rewrites of a mode on a graph, then cleans up, recompiles and verifies it.

    Args:
        gm: A captured graph; edited in place.
        plan: What is to become of its pruned weights.
        mode: "train" or "infer".

    Returns:
        The number of changes; with none the graph's code is as it was.

    Raises:
        GraphError: If the graph reads a weight in another way than planned.
    """
    rewrites, verify = (TRAIN, verify_masked) if mode == "train" else (INFER, verify_folded)
    changes = sum(rewrite(gm, plan) for rewrite in rewrites)
    if changes:
        # Only our own nodes: in-place ops of the model have no users and must stay.
        gm.graph.eliminate_dead_code(lambda node: node.target is not mask_ste_op)
        gm.recompile()
    gm.graph.lint()
    verify(plan)
    return changes
