"""The measured time of every weight of a model at several patterns, by the kernel search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..autotune.measure import AutotuneBudget
from ..autotune.select_kernel import select_kernel
from ..backends.kernel_family import WeightFormat
from ..config import CompileConfig
from ..errors import ConfigError
from ..graph.capture import capture_inputs, map_parameter_names
from ..graph.names import strip_adapter_prefix
from ..passes import PlannedWeight, find_uses
from ..patterns import Pattern
from .lookup import analyse_layers


def time_patterns(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    patterns: Mapping[str, Sequence[Pattern]],
    config: CompileConfig,
) -> dict[str, dict[str, float]]:
    """Measures what ``compile`` would run for weights at some patterns, in milliseconds.

    Times are of the kernels alone, beside dense in turns, and are kept on disk as all that the
    kernel search measures. A pattern that no kernel makes faster counts as dense.

    Args:
        model: A dense model.
        args: Positional inputs of the call.
        kwargs: Keyword inputs of the call.
        patterns: By the name of a weight, the patterns to measure.
        config: Options of the kernel search; ``autotune_seconds`` is for all together.

    Returns:
        Milliseconds by weight and by the text of a pattern; dense patterns have dense's time.

    Raises:
        ConfigError: The forward takes several graphs, or a weight could not be measured.
    """
    with torch.no_grad(), analyse_layers(model):
        captured = capture_inputs(model, *args, **kwargs)
    if captured is None:
        raise ConfigError(
            f"{type(model).__name__} takes several graphs, so its layers cannot be timed alone: "
            "give a budget of MACs"
        )
    graph, inputs = captured
    budget = AutotuneBudget(config.autotune_seconds)
    known = {id(p): names for p, names in zip(model.parameters(), _names(model), strict=True)}
    times: dict[str, dict[str, float]] = {}
    for position, node in enumerate(graph.gm.graph.find_nodes(op="placeholder")):
        name = known.get(id(inputs[position]), "")
        for pattern in patterns.get(name, ()):
            if pattern.is_dense:
                continue
            weight = inputs[position]
            row = PlannedWeight(
                node,
                position,
                name,
                pattern,
                tuple(weight.shape),
                find_uses(node),
                WeightFormat(pattern),
            )
            times.setdefault(name, {}).update(_measure(row, weight, config, budget))
    _require_all(patterns, times)
    return times


def _names(model: nn.Module) -> list[str]:
    return [strip_adapter_prefix(names[0]) for names in map_parameter_names(model).values()]


def _measure(
    row: PlannedWeight, weight: torch.Tensor, config: CompileConfig, budget: AutotuneBudget
) -> dict[str, float]:
    """Returns the milliseconds of a pattern, and of dense as "dense"; nothing if not measured."""
    with torch.no_grad():
        planned = select_kernel(row, weight.detach(), config, budget)
    if planned.times is None:
        return {}
    faster = planned.kernel is not None
    time = planned.times.sparse_ms if faster else planned.times.dense_ms
    return {str(row.pattern): time, "dense": planned.times.dense_ms}


def _require_all(
    patterns: Mapping[str, Sequence[Pattern]], times: dict[str, dict[str, float]]
) -> None:
    """Gives dense patterns, and those without a kernel, dense's time. Raises ConfigError."""
    for name, own in patterns.items():
        measured = times.get(name, {})
        if "dense" not in measured:
            raise ConfigError(
                f"{name} was not timed at {', '.join(map(str, own))}: no kernel of this machine "
                "runs it, or autotune_seconds were spent; give more, or a budget of MACs"
            )
        dense = measured.pop("dense")
        for pattern in own:
            measured.setdefault(str(pattern), dense)
