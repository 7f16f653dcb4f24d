"""Gradient checkpointing in a graph that runs op by op.

TorchDynamo's op for it leaves random numbers to Inductor, which functionalizes them. Run as it
stands, its backward would recompute with another dropout than the forward had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.utils.checkpoint import checkpoint

from ..graph.retarget import retarget

CONTEXT = "_checkpoint_context_fn"
"""Where Dynamo keeps the contexts of selective checkpointing, in the metadata of the sub-graph."""


def preserve_randomness(gm: fx.GraphModule) -> int:
    """``tag_activation_checkpoint(body, x) -> checkpoint(body, x)``; returns how many there were.

    The latter restores the state of the random generators, unless the model itself says otherwise.
    """
    return retarget(gm, tag_activation_checkpoint, run_checkpointed)


def run_checkpointed(body: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Runs a sub-graph, and again in the backward pass, with the same random numbers."""
    options: dict[str, Any] = {**kwargs, "use_reentrant": False}
    contexts: Callable[[], Any] | None = body.meta.get(CONTEXT)
    if contexts is not None:
        options["context_fn"] = contexts
    return checkpoint(body, *args, **options)
