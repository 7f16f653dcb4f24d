"""graph -> Topology: the prunable ops, contracted, with networkx."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import networkx as nx
from torch import Tensor

from ...graph.flat_graph import Op, iterate_written
from ...reports import Topology
from .find_sites import Sites

_MERGES = {"add", "iadd", "cat", "concat", "concatenate", "stack", "add_", "sub"}


def name_weighted_ops(sites: Sites) -> dict[Op, str]:
    """Returns the names of ops that multiply by a weight: the layer's, "#2" for a second use."""
    names: dict[Op, str] = {}
    uses: dict[str, int] = {}
    for site in sites.sites:
        if site.kind != "attention" and site.op is not None and site.op not in names:
            layer = site.label.removesuffix(".weight")
            uses[layer] = uses.get(layer, 0) + 1
            names[site.op] = layer if uses[layer] == 1 else f"{layer}#{uses[layer]}"
    return names


def contract(sites: Sites, kept: Iterable[Op]) -> nx.DiGraph[Op]:
    """Returns the graph between ``kept`` ops and the graph's inputs; edges pass other ops."""
    keep = {*kept, *sites.inputs}
    graph: nx.DiGraph[Op] = nx.DiGraph()
    graph.add_nodes_from(op for op in sites.ops if op in keep)
    nearest: dict[Op, frozenset[Op]] = {op: frozenset() for op in sites.parameters}
    for op in sites.ops:
        if op in sites.parameters:
            continue
        above = frozenset().union(*(nearest[source] for source in op.inputs))
        if op in keep:
            graph.add_edges_from((source, op) for source in above)
        nearest[op] = frozenset((op,)) if op in keep else above
        for target in iterate_written(op):
            if target not in sites.parameters:
                nearest[target] |= nearest[op]
    return graph


def find_ends(sites: Sites) -> tuple[frozenset[Op], frozenset[Op]]:
    """Returns (first, last): sole readers of a graph input, and ops before no prunable op.

    An input that many ops read (a text embedding under every cross-attention) makes none of them
    a first layer.
    """
    ops = name_weighted_ops(sites)
    graph = contract(sites, ops)
    first = set()
    for source in sites.inputs:
        entries = [op for op in graph.successors(source) if sites.inputs >= {*graph.pred[op]}]
        if len(entries) == 1:
            first.add(entries[0])
    last = {op for op in ops if graph.out_degree(op) == 0}
    return frozenset(first), frozenset(last)


def trace_topology(sites: Sites) -> Topology:
    """Describes how the graph's prunable ops are wired.

    Args:
        sites: Every product of the graph.

    Returns:
        First and last ops, skip connections and the critical path.
    """
    names = name_weighted_ops(sites)
    first, last = find_ends(sites)
    macs = dict.fromkeys(names, 0)
    for site in sites.sites:
        if site.op is not None and site.op in macs:
            macs[site.op] += site.product.macs()
    path = _heaviest_path(contract(sites, names), macs)
    return Topology(
        first=frozenset(names[op] for op in first),
        last=frozenset(names[op] for op in last),
        skips=_skips(sites, names),
        critical_path=tuple(names[op] for op in path),
        critical_macs=sum(macs[op] for op in path),
        macs={names[op]: count for op, count in macs.items()},
    )


def _heaviest_path(graph: nx.DiGraph[Op], macs: dict[Op, int]) -> list[Op]:
    weighted: nx.DiGraph[Any] = nx.DiGraph(
        (a, b, {"weight": macs[b]}) for a, b in graph.edges if a in macs and b in macs
    )
    start = object()
    weighted.add_weighted_edges_from((start, op, count) for op, count in macs.items())
    return [op for op in nx.dag_longest_path(weighted) if op is not start]


def _skips(sites: Sites, names: dict[Op, str]) -> tuple[tuple[str, str], ...]:
    """(source, merge) of the edges into merge points that a longer way round makes redundant."""
    merges = {op: op.name for op in sites.ops if _is_merge(op)}
    graph = contract(sites, [*names, *merges])
    graph.remove_nodes_from(sites.inputs)
    kept = nx.transitive_reduction(graph).edges
    label = {**merges, **names}
    return tuple((label[a], label[b]) for a, b in graph.edges if b in merges and (a, b) not in kept)


def _is_merge(op: Op) -> bool:
    target = op.node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    calls = op.node.op in ("call_function", "call_method")
    return calls and name in _MERGES and sum(isinstance(i.value, Tensor) for i in op.inputs) > 1
