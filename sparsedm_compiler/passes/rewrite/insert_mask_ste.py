"""``op(x, w) -> op(x, mask_ste(w))``: the forward runs masked, the gradient stays dense."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from ...graph.flat_graph import get_example_value
from ...masks.mask_ste import mask_ste_op
from ...patterns import Pattern


def insert_mask_ste(gm: fx.GraphModule, patterns: Mapping[fx.Node, Pattern]) -> int:
    """Mask each of these weight placeholders before its first reader; how many were masked.

    An accepted weight is masked everywhere it is read, so one mask per graph serves tied weights
    and the sub-graphs (checkpointed blocks) the weight is passed into.
    """
    return sum(_mask(gm.graph, weight, pattern) for weight, pattern in patterns.items())


def _mask(graph: fx.Graph, weight: fx.Node, pattern: Pattern) -> int:
    readers = [user for user in weight.users if user.target is not mask_ste_op]
    if not readers:
        return 0
    with graph.inserting_before(min(readers)):
        masked = graph.call_function(mask_ste_op, (weight, str(pattern)))
    masked.meta = {key: weight.meta[key] for key in ("stack_trace",) if key in weight.meta}
    value = get_example_value(weight)
    if isinstance(value, Tensor):
        masked.meta["example_value"] = mask_ste_op(value, str(pattern))
    for reader in readers:
        reader.replace_input_with(weight, masked)
    return 1
