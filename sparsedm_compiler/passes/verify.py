"""What a legal rewritten graph is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ..errors import GraphError
from ..masks.mask_ste import mask_ste_op
from ..patterns import Pattern


def verify(gm: fx.GraphModule, patterns: Mapping[fx.Node, Pattern]) -> None:
    """Raise GraphError unless every weight to be masked is read only through its mask."""
    gm.graph.lint()
    for weight, pattern in patterns.items():
        bare = [user for user in weight.users if user.target is not mask_ste_op]
        if bare:
            raise GraphError(
                f"{weight.name} is read unmasked by {bare[0].name}: {bare[0].format_node()}"
            )
        for mask in weight.users:
            if mask.args != (weight, str(pattern)) or not mask.users:
                raise GraphError(f"{mask.format_node()} does not mask {weight.name} to {pattern}")
