"""Guards that tie a graph to the modules whose parameters it was captured with."""

from __future__ import annotations

from torch import fx, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._guards import ChainedSource, Source


def pin_modules(gm: fx.GraphModule) -> None:
    """Makes TorchDynamo run a graph for no other modules than those it was captured from.

    A backend calls it. Where a call breaks into several graphs, the frames of layers are compiled
    on their own, and TorchDynamo would else run the graph of one layer for all others of its
    shape: a dense one for a pruned one.
    """
    for node in gm.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        if argument is not None and isinstance(argument.example, nn.Parameter):
            source = _find_owner(argument.source)
            install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def _find_owner(parameter: Source) -> Source:
    """Returns the source of the module that owns a parameter, or of the parameter if none does."""
    source = parameter
    while isinstance(source, ChainedSource):
        if isinstance(source, AttrSource) and source.member == "_parameters":
            return source.base
        source = source.base
    return parameter
