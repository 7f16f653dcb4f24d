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

CONTEXT = "_checkpoint_context_fn"
"""Where Dynamo keeps the contexts of selective checkpointing, in the metadata of the sub-graph."""


def preserve_randomness(gm: fx.GraphModule) -> int:
    """``tag_activation_checkpoint(body, x) -> checkpoint(body, x)``; returns how many there were.

    The latter restores the state of the random generators, unless the model itself says otherwise.
    """
    count = 0
    for module in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
        nodes = module.graph.find_nodes(op="call_function", target=tag_activation_checkpoint)
        for node in nodes:
            node.target = run_checkpointed
        if nodes:
            module.recompile()
        count += len(nodes)
    return count


def run_checkpointed(body: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Runs a sub-graph, and again in the backward pass, with the same random numbers."""
    options: dict[str, Any] = {**kwargs, "use_reentrant": False}
    contexts: Callable[[], Any] | None = body.meta.get(CONTEXT)
    if contexts is not None:
        options["context_fn"] = contexts
    return checkpoint(body, *args, **options)
