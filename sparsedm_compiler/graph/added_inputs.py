"""Inputs that are added to a graph of Dynamo's, which passes only those that it knows itself."""

from __future__ import annotations

from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor

from .flat_graph import get_example_value

MASK, LAYOUT, HELD = "mask", "layout", "held"
"""The kinds of an added input: a frozen mask, in what form a kernel gets what one keeps, and a held
mask or the fixed scale of a soft threshold."""


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy of a graph of Dynamo's, which goes on reading its own after it was compiled.

    Modules and tensors are shared, and what Dynamo tells an inner compiler about them is kept.
    """
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, nodes))
    copy = fx.GraphModule(gm, graph)
    copy.meta = gm.meta
    for old, new in nodes.items():
        if "_dynamo_source" in old.__dict__:
            new.__dict__["_dynamo_source"] = old.__dict__["_dynamo_source"]
    for name, value in gm.__dict__.items():
        copy.__dict__.setdefault(name, value)
    return copy


def add_input(graph: fx.Graph, kind: str, of: fx.Node, value: Tensor) -> fx.Node:
    """Returns a new last placeholder, for a tensor that lies at one address in all calls.

    Args:
        graph: A graph of ``copy_graph``.
        kind: What it is of another input: MASK or LAYOUT.
        of: That other input.
        value: The tensor that will be passed.
    """
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"{of.name}_{kind}")
    # Dynamo's own metadata: where an input comes from, and that CUDA graphs need not copy it.
    node._dynamo_source = ConstantSource(f"sparsedm_{node.name}")
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node.meta["sparsedm_added"] = kind
    like = get_example_value(of)
    if isinstance(like, FakeTensor):
        node.meta["example_value"] = like.fake_mode.from_tensor(value, static_shapes=True)
    elif isinstance(like, Tensor):
        node.meta["example_value"] = value
    return node


def is_added(node: object, kind: str) -> bool:
    """Returns whether a node is an input of ``add_input``, of that kind."""
    return isinstance(node, fx.Node) and node.meta.get("sparsedm_added") == kind
