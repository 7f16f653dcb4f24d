"""The torch.compile entry point ``backend="sparsedm"``: one graph of a model never seen whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import fx

from ..autotune.measure import AutotuneBudget
from ..config import CompileConfig
from ..errors import ConfigError
from ..graph.capture import CapturedGraph, bind_parameters_by_source
from ..masks.detect import detect_patterns
from ..passes import find_sites, mark_prunable
from ..reports import Decision
from .explanations import explain_folded_gradient
from .folded_weights import FoldedWeights
from .lower import lower, plan_weights
from .phase_clock import PhaseClock


def sparsedm(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles one graph: ``torch.compile(model, backend="sparsedm", options={"pattern": "2:4"})``.

    Whether the graph runs at all is torch.compile's affair: only a model from
    ``sparsedm_compiler.compile`` is guarded against a silent dense run. This entry point warns
    where it sees one: at a graph break, where no weight fits, and at the last graph that Dynamo
    makes of one function.

    Args:
        gm: The graph that Dynamo captured.
        example_inputs: Its inputs, the parameters among them.
        options: Those of ``sparsedm_compiler.compile`` but ``inplace`` and ``finalize``. ``mode``
            is "infer" by default; without a ``pattern``, weights run by the one they satisfy.
        mode: torch.compile's own option, which this backend does not take.

    Returns:
        A callable that takes the inputs of the graph.

    Raises:
        ConfigError: For ``mode``, an unknown option or a value that fits nothing.
        PatternError: If a pattern is misspelled.
        MaskError: If a weight to be masked holds NaN or Inf.
        DenseRunError: If a folded weight needs a gradient, in mode "infer".
    """
    if mode is not None:
        raise ConfigError(
            f"torch.compile's mode={mode!r} is not for this backend; choose the inner compiler in "
            "options={'pattern': '2:4', 'backend': 'inductor'}"
        )
    values: dict[str, Any] = {"mode": "infer", **(options or {})}
    known = [field.name for field in fields(CompileConfig) if field.name != "finalize"]
    for option in values:
        if option not in known:
            raise ConfigError(f"option {option!r} is none of {', '.join(known)}")
    graph = bind_parameters_by_source(gm)
    config = CompileConfig.create(values.pop("pattern", None), **values)
    if config.pattern is None:
        config = _detect(graph, example_inputs, config)
    config = config.evaluate_predicate(graph.names.values())
    decisions = {row.weight: row for row in mark_prunable(find_sites(graph), config)}
    weight = _find_trained_weight(decisions, graph, example_inputs, config)
    if weight is not None:  # before anything is measured; at the call, as its own error
        return partial(_refuse_gradient, weight)
    weights, budget = FoldedWeights(), AutotuneBudget(config.autotune_seconds)
    plan = plan_weights(graph, example_inputs, decisions, config, weights, budget)
    _warn_of_dense_runs(gm, decisions, config, pruned=len(plan))
    run, _ = lower(graph, example_inputs, plan, config, weights, PhaseClock())
    return run


def _find_trained_weight(
    decisions: Mapping[str, Decision],
    graph: CapturedGraph,
    example_inputs: list[Any],
    config: CompileConfig,
) -> str | None:
    """Returns a weight that is to be folded though it needs a gradient, None if there is none."""
    if config.mode != "infer" or not torch.is_grad_enabled():
        return None
    for node, x in zip(graph.gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        decision = decisions.get(graph.names[node][0]) if node in graph.names else None
        if decision is not None and decision.accepted and x.requires_grad:
            return decision.weight
    return None


def _refuse_gradient(weight: str, *_: Any) -> NoReturn:
    raise explain_folded_gradient(weight)


def _warn_of_dense_runs(
    gm: fx.GraphModule, decisions: Mapping[str, Decision], config: CompileConfig, *, pruned: int
) -> None:
    """Warns of all that this entry point sees but cannot prevent."""
    reason = gm.__dict__.get("compile_subgraph_reason")
    if reason is not None and reason.graph_break:
        _warn(
            "the model breaks into several graphs, and the first and last layer of each stays "
            f"dense; sparsedm_compiler.compile(model) sees them as one ({reason.reason})"
        )
    if decisions and not pruned and config.pattern is not None:
        why = "; ".join(f"{row.weight}: {row.refusal}" for row in list(decisions.values())[:3])
        _warn(f"no weight of this graph is pruned to {config.pattern}, so it runs dense: {why}")
    current = torch._guards.CompileContext.current_compile_id()
    limit = torch._dynamo.config.recompile_limit
    if current is not None and (current.frame_compile_id or 0) + 1 >= limit:
        _warn(
            f"this is graph {limit} of one function, the most that torch.compile makes: at the "
            "next new shape it runs dense. Pad inputs to fewer shapes, raise "
            "torch._dynamo.config.recompile_limit, or use sparsedm_compiler.compile(model), "
            "which raises instead"
        )


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


def _detect(
    graph: CapturedGraph, example_inputs: list[Any], config: CompileConfig
) -> CompileConfig:
    """Returns ``config`` with the patterns that the weights of the graph satisfy already."""
    placeholders = zip(graph.gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
    parameters = ((graph.names[node][0], x) for node, x in placeholders if node in graph.names)
    config = replace(config, overrides=detect_patterns(parameters))
    if graph.names and not config.overrides:
        warnings.warn(
            "no weight of this graph satisfies an N:M pattern, so it runs dense; give the one "
            "to prune to: options={'pattern': '2:4'}",
            stacklevel=2,
        )
    return config
