"""graph -> MacsReport: exact MACs per call node, dense and effective sparse."""

from __future__ import annotations

from collections.abc import Iterable

from ...graph.names import strip_adapter_prefix
from ...reports import Decision, MacRow, MacsReport
from .find_sites import Site
from .mark_prunable import index_by_weight


def count_macs(sites: Iterable[Site], decisions: tuple[Decision, ...]) -> MacsReport:
    """Counts the MACs of one run of the graph; a pruned weight counts its kept share, exactly.

    Args:
        sites: Every product of the graph.
        decisions: What happens to the weights.

    Returns:
        The report, one row per site.
    """
    by_weight = index_by_weight(decisions)
    return _sum_rows(
        _count_site(site, by_weight.get(strip_adapter_prefix(site.label))) for site in sites
    )


def _count_site(site: Site, decision: Decision | None) -> MacRow:
    """Counts the MACs of one site. The pruned width divides by m, so the sparse count is exact."""
    dense = site.product.macs()
    pattern = None if decision is None else decision.pattern
    sparse = dense if pattern is None else int(dense * pattern.density)
    refusal = None if decision is None else decision.refusal
    label = strip_adapter_prefix(site.label).removesuffix(".weight")
    return MacRow(label, site.kind, site.op_name, site.shape, dense, sparse, pattern, refusal)


def _sum_rows(rows: Iterable[MacRow]) -> MacsReport:
    """Returns the report of these rows."""
    rows = tuple(rows)
    layers = [r for r in rows if r.kind != "attention"]
    return MacsReport(
        dense=sum(r.dense for r in layers),
        sparse=sum(r.sparse for r in layers),
        attention=sum(r.dense for r in rows if r.kind == "attention"),
        rows=rows,
    )
