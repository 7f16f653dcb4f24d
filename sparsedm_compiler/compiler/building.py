"""One captured graph -> what runs it: rewritten for training, or folded for inference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..config import CompileConfig
from ..errors import MaskError
from ..graph.capture import CapturedGraph, bind_parameters_by_source
from ..graph.names import strip_adapter_prefix
from ..masks.detect import detect_patterns
from ..passes.analysis.find_sites import find_sites
from ..passes.analysis.mark_prunable import mark_prunable
from ..passes.pipeline import run_rewrites
from ..patterns import Pattern
from ..reports import Choice, Decision
from .lower import Folding, fold, lower, multiply_sparse


def build(
    graph: CapturedGraph,
    example_inputs: list[Any],
    patterns: Mapping[fx.Node, Pattern],
    config: CompileConfig,
    folding: Folding,
) -> tuple[Callable[..., Any], tuple[Choice, ...]]:
    """Rewrite (train) or fold (infer) the graph, and hand it to the inner compiler."""
    weights = {
        node: (strip_adapter_prefix(graph.names[node][0]), pattern)
        for node, pattern in patterns.items()
    }
    if config.mode == "train":
        run_rewrites(graph.gm, patterns)
        choices = multiply_sparse(graph.gm, weights, config)
        return lower(graph.gm, example_inputs, config.backend), choices
    return fold(graph.gm, example_inputs, weights, config, folding)


def compile_graph(
    gm: fx.GraphModule, example_inputs: list[Any], config: CompileConfig
) -> Callable[..., Any]:
    """One graph of a model we never saw (the torch.compile entry point)."""
    graph = bind_parameters_by_source(gm)
    if config.pattern is None:
        placeholders = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        given = ((graph.names[node][0], x) for node, x in placeholders if node in graph.names)
        config = replace(config, overrides=detect_patterns(given))
        if graph.names and not config.overrides:
            warnings.warn(
                "no weight of this graph satisfies an N:M pattern, so it runs dense; give the one "
                "to prune to: options={'pattern': '2:4'}",
                stacklevel=2,
            )
    config = config.asked(graph.names.values())
    decisions = mark_prunable(find_sites(graph), config)
    patterns = patterns_of(graph, {decision.weight: decision for decision in decisions})
    folding = Folding(config)
    check_finite(graph, example_inputs, patterns, folding)
    return build(graph, example_inputs, patterns, config, folding)[0]


def patterns_of(graph: CapturedGraph, decisions: Mapping[str, Decision]) -> dict[fx.Node, Pattern]:
    """The placeholders of the graph that are pruned weights, with their patterns."""
    found = {}
    for node, names in graph.names.items():
        decision = decisions.get(strip_adapter_prefix(names[0]))
        if decision is not None and decision.pattern is not None:
            found[node] = decision.pattern
    return found


def check_finite(
    graph: CapturedGraph,
    example_inputs: list[Any],
    patterns: Mapping[fx.Node, Pattern],
    folding: Folding,
) -> None:
    """Raise MaskError if a weight to be masked holds NaN or Inf: its magnitudes mean nothing."""
    for node, value in zip(
        graph.gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True
    ):
        if node not in patterns or not isinstance(value, Tensor) or value.is_meta:
            continue
        if isinstance(value, FakeTensor):
            continue
        if folding.folds.finalized(
            value, strip_adapter_prefix(graph.names[node][0])
        ) is None and not bool(value.detach().isfinite().all()):
            raise MaskError(
                f"parameter {graph.names[node][0]!r} holds NaN or Inf, so its mask would be "
                "arbitrary; load a checkpoint with finite weights"
            )
