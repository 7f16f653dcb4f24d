"""``count_macs`` and ``topology``: analyses of a model that prune nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..config import CompileConfig
from ..errors import CaptureError, ConfigError
from ..graph.capture import CapturedGraph, capture, map_parameter_names
from ..graph.recorded_run import record_run
from ..passes import Site, Sites, find_recorded_sites, find_sites, mark_prunable, trace_topology
from ..passes import count_macs as count_sites
from ..patterns import Pattern
from ..reports import Decision, MacsReport, Topology
from .lookup import analyse_layers


def count_macs(
    model: nn.Module,
    *args: Any,
    pattern: str | Pattern = "2:4",
    keep_dense: str | Iterable[str] | Callable[[str], bool] = (),
    overrides: Mapping[str, str | Pattern] | None = None,
    policy: str = "structural",
    **kwargs: Any,
) -> MacsReport:
    """Counts the exact MACs of one forward, dense and as pruned to a pattern.

    Nothing is computed, so that models and inputs on the meta device work.

    Args:
        model: Any nn.Module.
        *args: Positional inputs of ``model``.
        pattern: The pattern to prune to, as in ``compile``.
        keep_dense: Layers that stay dense, as in ``compile``.
        overrides: Other patterns for some layers, as in ``compile``.
        policy: Which layers are pruned, as in ``compile``.
        **kwargs: Keyword inputs of ``model``.

    Returns:
        A report with conv+linear MACs in ``.dense`` and ``.sparse``, attention (QK+AV) apart in
        ``.attention``, and one row per call node in ``.rows``; ``str()`` is a table.

    Raises:
        PatternError: If a pattern is misspelled.
        ConfigError: If an option has an unknown value or a glob names no parameter.
        CaptureError: If the model cannot be called with these inputs.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> report = sdm.count_macs(net, torch.randn(1, 8), pattern="2:4")
        >>> report.dense, report.sparse
        (192, 160)
    """
    config = CompileConfig.create(
        pattern, keep_dense=keep_dense, overrides=overrides, policy=policy
    )
    return count_sites(*decide_weights(model, config, args, kwargs))


def decide_weights(
    model: nn.Module,
    config: CompileConfig,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    captured: CapturedGraph | None = None,
) -> tuple[tuple[Site, ...], tuple[Decision, ...]]:
    """Decides on every weight of one forward, as ``compile`` would; computes nothing.

    Args:
        model: Any nn.Module.
        config: The options of ``compile``.
        args: Positional inputs of ``model``.
        kwargs: Keyword inputs of ``model``.
        captured: The graph of that call; None captures it.

    Returns:
        Every product of the forward, and the decision about every weight, in execution order.

    Raises:
        ConfigError: If a glob of the options names no parameter.
        CaptureError: If the model cannot be called with these inputs.
    """
    config = config.bind(list(map_parameter_names(model).values()))
    with torch.no_grad(), analyse_layers(model):
        graph = captured or capture(model, *args, **kwargs)
        if graph is not None:
            sites = find_sites(graph)
            if _has_all_sizes(sites):
                return sites.sites, mark_prunable(sites, config)
        sites = _record_sites(model, args, kwargs)
    return sites.sites, mark_prunable(sites, config)


def _has_all_sizes(sites: Sites) -> bool:
    """Returns whether a graph shows the sizes of all products, none of which depends on data."""
    try:
        return all(isinstance(site.product.macs(), int) for site in sites.sites)
    except GuardOnDataDependentSymNode:
        return False


def _record_sites(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sites:
    """Returns the products of an eager run, for a model of which no one graph shows all sizes."""
    try:
        return find_recorded_sites(record_run(model, *args, **kwargs))
    except NotImplementedError as error:  # of meta tensors
        raise CaptureError(
            f"the sizes in {type(model).__name__} depend on the data, so it cannot be counted on "
            f"the meta device; give a real model and inputs ({error})"
        ) from error


def topology(model: nn.Module, *args: Any, **kwargs: Any) -> Topology:
    """Describes how the prunable ops of one forward are wired.

    Args:
        model: Any nn.Module.
        *args: Positional inputs of ``model``.
        **kwargs: Keyword inputs of ``model``.

    Returns:
        The first and last layers, the skip connections and the path with the most MACs.

    Raises:
        ConfigError: If the model takes several graphs (it has graph breaks).
        CaptureError: If the model cannot be called with these inputs.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> sdm.topology(net, torch.randn(1, 8)).critical_path
        ('0', '1', '2')
    """
    with torch.no_grad(), analyse_layers(model):
        graph = capture(model, *args, **kwargs)
    if graph is None:
        raise ConfigError(
            f"{type(model).__name__} takes several graphs (its forward asks tensors for Python "
            "values), so it has no topology; torch.compile(model, fullgraph=True) shows the line"
        )
    sites = find_sites(graph)
    if not all(isinstance(site.product.macs(), int) for site in sites.sites):
        raise ConfigError(
            f"sizes in {type(model).__name__} depend on the data, so its paths have no weight"
        )
    return trace_topology(sites)
