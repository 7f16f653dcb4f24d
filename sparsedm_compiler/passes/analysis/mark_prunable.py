"""weight -> Decision: pruned to a pattern, or left dense for a reason that is a sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from ...config import CompileConfig, matches
from ...graph.capture import Names
from ...graph.flat_graph import Op, find_readers
from ...graph.names import strip_adapter_prefix
from ...graph.unknown_ops import describe_target, may_multiply
from ...patterns import Pattern
from ...reports import Decision
from .find_sites import Site, Sites
from .topology import find_ends

UVIT_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The layers that the authors of SparseDM prune in a U-ViT."""

ADDED = "it is part of an adapter, or was added to the model after compile()"
"""Why a weight stays dense that is none of the model's own."""


def mark_prunable(
    sites: Sites, config: CompileConfig, known: Collection[str] | None = None, *, whole: bool = True
) -> tuple[Decision, ...]:
    """Decides on every weight of a graph or run (a tied weight has one decision).

    Args:
        sites: Every product of the graph.
        config: The user's options.
        known: Names of the parameters that were in the model when it was compiled; weights added
            since (adapters) stay dense. None: all are known.
        whole: Whether it is the whole model, so that its first and last ops are the model's. Of a
            part, where a value comes from is not known: it has decisions on parameters alone.

    Returns:
        One decision per weight, in execution order.
    """
    first, last = find_ends(sites) if whole else (frozenset[Op](), frozenset[Op]())
    at_end: dict[Op | None, str] = {**dict.fromkeys(last, "last"), **dict.fromkeys(first, "first")}
    grouped: dict[str, list[Site]] = {}
    for site in sites.sites:
        if site.kind != "attention" and (whole or site.names):
            grouped.setdefault(site.label, []).append(site)
    decisions = [
        decide_weight(uses[0], _refuse_by_use(uses, at_end, config), config, known)
        for uses in grouped.values()
    ]
    named = {decision.weight for decision in decisions}
    return (*decisions, *_list_unknown(sites, named))


def _list_unknown(sites: Sites, named: Collection[str]) -> Iterator[Decision]:
    """Yields decisions on weights that no known product reads, but an op that may be one."""
    for parameter, names in sites.parameters.items():
        name, shape = strip_adapter_prefix(names[0]), tuple(parameter.value.shape)
        if name in named or len(shape) < 2:
            continue
        for reader, _ in find_readers(parameter):
            if may_multiply(reader):
                refusal = f"it is read by {describe_target(reader)}, an op that is not known here"
                yield Decision(name, describe_target(reader), shape, None, refusal)
                break


def decide_weight(
    site: Site, refusal: str | None, config: CompileConfig, known: Collection[str] | None = None
) -> Decision:
    """Decides on one weight: by the user's options, then ``refusal``, then its size.

    Args:
        site: A product by the weight.
        refusal: Why its use in the graph keeps it dense; None if it does not.
        config: The user's options.
        known: As in ``mark_prunable``.

    Returns:
        The decision.
    """
    names = tuple(strip_adapter_prefix(name) for name in site.names) or (site.label,)
    pattern = _find_pattern(names, config)
    refusal = _refuse_by_options(names, config, known if site.names else None) or refusal
    if pattern is None:
        refusal = refusal or "its values satisfy no N:M pattern"
    else:
        refusal = refusal or pattern.misfit(site.shape[0], site.shape[1])
    accepted = None if refusal else pattern
    return Decision(names[0], site.op_name, site.shape, accepted, refusal)


def may_be_pruned(
    names: Names, shape: tuple[int, ...], config: CompileConfig, known: Collection[str]
) -> bool:
    """Returns whether a weight that no graph has shown yet would be pruned where it is multiplied.

    Args:
        names: The parameter's names.
        shape: Its shape.
        config: The user's options.
        known: As in ``mark_prunable``.

    Returns:
        False where the options or its size keep it dense.
    """
    pattern = _find_pattern(names, config)
    if len(shape) < 2 or pattern is None or _refuse_by_options(names, config, known):
        return False
    return pattern.misfit(shape[0], shape[1]) is None


def _find_pattern(names: Names, config: CompileConfig) -> Pattern | None:
    return next((p for glob, p in config.overrides if matches(glob, names)), config.pattern)


def _refuse_by_options(
    names: Names, config: CompileConfig, known: Collection[str] | None
) -> str | None:
    if known is not None and not any(name in known for name in names):
        return ADDED
    for glob in config.dense_globs:
        if matches(glob, names):
            return f"kept dense by keep_dense={glob!r}"
    if config.policy == "uvit" and not any(
        name.removesuffix(".weight").endswith(UVIT_LAYERS) for name in names
    ):
        return "not in the layer set of policy='uvit'"
    return None


def _refuse_by_use(
    uses: list[Site], at_end: Mapping[Op | None, str], config: CompileConfig
) -> str | None:
    """Returns why a use of the weight keeps it dense, or None; one such use is enough."""
    for site in uses:
        if site.refusal:
            return site.refusal
    if config.policy == "structural" and config.pattern is not None:
        for site in uses:
            if site.op in at_end:
                return f"{at_end[site.op]} op of the graph"
    return _refuse_other_readers(uses)


def _refuse_other_readers(uses: list[Site]) -> str | None:
    if uses[0].names and all(strip_adapter_prefix(name) != name for name in uses[0].names):
        return None  # adapters of PEFT read the weight themselves (DoRA's norm), and get it masked
    parameter = uses[0].parameter
    multiplied = {site.op for site in uses}
    for reader, _ in find_readers(parameter) if parameter is not None else ():
        if reader not in multiplied:
            return f"it is also read by {reader.name}, which is neither a linear nor a convolution"
    return None


def index_by_weight(decisions: tuple[Decision, ...]) -> Mapping[str, Decision]:
    """Returns the decisions by weight name."""
    return {decision.weight: decision for decision in decisions}
