"""The cost of every layer at every candidate: exact MACs, or measured milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ...compiler.counting import decide_weights
from ...compiler.time_patterns import time_patterns
from ...config import CompileConfig
from ...graph.names import strip_adapter_prefix
from ...passes import Site
from ...patterns import Pattern
from ..batches import CalibrationBatch
from ..targets import Target


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """What layers cost.

    Attributes:
        unit: "MACs" or "ms".
        fixed: The cost of the layers that stay dense in any case; 0 for times.
        by_weight: The cost by weight and candidate.
        uniform: The cost of all layers at one pattern, where that was asked for as a budget.
    """

    unit: str
    fixed: float
    by_weight: Mapping[str, Mapping[str, float]]
    uniform: float | None


def count_costs(
    sites: Sequence[Site], candidates: Mapping[str, Sequence[Target]], uniform: Pattern | None
) -> LayerCosts:
    """Counts the MACs of convolutions and linear layers; a pattern keeps its share, exactly.

    uniform: The pattern of a budget; weights that it does not fit count dense there.
    """
    macs: dict[str, int] = {}
    fixed = 0
    for site in sites:
        if site.kind == "attention":
            continue
        name = strip_adapter_prefix(site.label)
        if name in candidates:
            macs[name] = macs.get(name, 0) + site.product.macs()
        else:
            fixed += site.product.macs()
    costs = {
        name: {str(t.pattern): float(macs[name] * t.pattern.density) for t in own}
        for name, own in candidates.items()
    }
    total = None
    if uniform is not None:
        total = float(fixed)
        for name, own in candidates.items():
            shape = own[0].weight.shape
            fits = uniform.misfit(shape[0], shape[1]) is None
            total += macs[name] * (float(uniform.density) if fits else 1.0)
    return LayerCosts("MACs", float(fixed), costs, total)


def time_costs(
    model: nn.Module,
    batch: CalibrationBatch,
    candidates: Mapping[str, Sequence[Target]],
    uniform: Pattern | None,
    config: CompileConfig,
) -> LayerCosts:
    """Measures the milliseconds of the weights to prune, as the kernel search does.

    Raises:
        ConfigError: The forward takes several graphs, or a weight could not be measured.
    """
    patterns: dict[str, list[Pattern]] = {}
    for name, own in candidates.items():
        shape = own[0].weight.shape
        patterns[name] = [target.pattern for target in own]
        if uniform is not None and uniform.misfit(shape[0], shape[1]) is None:
            patterns[name].append(uniform)
    placed = batch.to_model(model)
    times = time_patterns(model, placed.args, dict(placed.kwargs), patterns, config)
    costs = {
        name: {str(target.pattern): times[name][str(target.pattern)] for target in own}
        for name, own in candidates.items()
    }
    total = None
    if uniform is not None:
        total = sum(
            own.get(str(uniform), max(own.values())) for own in times.values()
        )  # where it does not fit, dense is the slowest
    return LayerCosts("ms", 0.0, costs, total)


def list_candidates(
    model: nn.Module, config: CompileConfig, patterns: Sequence[Pattern], batch: CalibrationBatch
) -> tuple[Sequence[Site], dict[str, list[Target]]]:
    """Returns all products of a call, and of every weight to prune the candidates that fit it.

    A dense candidate fits every weight that some other fits.
    """
    names = {strip_adapter_prefix(n): p for n, p in model.named_parameters()}
    full = {strip_adapter_prefix(n): n for n, _ in model.named_parameters()}
    sites: Sequence[Site] = ()
    batch = batch.to_model(model)
    accepted: dict[str, list[Pattern]] = {}
    sparse = [pattern for pattern in patterns if not pattern.is_dense]
    for pattern in sparse:
        own = CompileConfig.create(pattern, keep_dense=config.keep_dense, policy=config.policy)
        sites, decisions = decide_weights(model, own, batch.args, dict(batch.kwargs))
        for row in decisions:
            if row.pattern is not None:
                accepted.setdefault(row.weight, []).append(pattern)
    dense = [pattern for pattern in patterns if pattern.is_dense]
    return sites, {
        name: [Target(full[name], names[name], pattern) for pattern in (*own, *dense)]
        for name, own in accepted.items()
    }
