"""Kernel selection: all that could run a weight are timed beside dense, the fastest wins."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backends.kernel_family import KernelConfig, KernelFamily, MatmulProblem, WeightFormat
from ..backends.registry import find_families, find_family, find_training_families
from ..config import GRAPHS, CompileConfig
from ..passes import KernelTimes, PlannedWeight, Refusal, Status
from ..patterns import Pattern
from .measure import AutotuneBudget, KernelTrial, measure_kernels, reproduces_dense
from .select_from_table import describe_source, find_card_table, find_table_row, make_kernel

MARGIN = 0.96
"""A sparse kernel must take less than this part of dense's time: a tie goes to dense."""


def select_kernel(
    row: PlannedWeight, weight: Tensor, config: CompileConfig, budget: AutotuneBudget
) -> PlannedWeight:
    """Plans what runs a folded weight: pinned, the only way, or the fastest measured.

    Args:
        row: The weight as planned so far; its kernel is ignored.
        weight: Its values.
        config: The user's options (``kernels``, ``exclude_kernels``, ``backend``).
        budget: The seconds left to measure, which this call spends.

    Returns:
        ``row`` with kernel, weight format, status, reason and times.
    """
    wanted = config.find_kernel(row.name)
    if isinstance(row.uses, Refusal):
        return row.run_dense(row.uses.sentence)
    if wanted == "dense":
        return row.run_dense("pinned by kernels=", status=Status.PINNED)
    graphs, fused = config.backend == GRAPHS, not weight.is_cuda and config.backend != "eager"
    trial = KernelTrial(weight, row.name, row.pattern, row.problems, graphs, fused)
    if wanted == "auto" and config.autotune == "table":
        return _select_from_table(row, trial, config, budget)
    return _select_candidate(row, trial, config, budget)


def _select_candidate(
    row: PlannedWeight, trial: KernelTrial, config: CompileConfig, budget: AutotuneBudget
) -> PlannedWeight:
    """Plans what runs a weight: the kernel that is pinned, or the fastest measured."""
    weight, wanted = trial.weight, config.find_kernel(row.name)
    candidates = _list_candidates(row, weight, config, wanted)
    if isinstance(candidates, Refusal):
        return row.run_dense(candidates.sentence)
    if wanted != "auto":
        kernel = _choose_setting(candidates, trial, budget)
        if kernel is None:
            return row.run_dense(explain_distrust(candidates))
        doubtful = weight.is_cuda and not find_family(kernel.name).inexact
        if doubtful and not reproduces_dense(trial, kernel):
            return row.run_dense(explain_distrust(candidates[:1]))
        return _run_sparse(row, weight, kernel, Status.PINNED, "pinned by kernels=")
    return _select_fastest(row, candidates, trial, config, budget)


def _select_from_table(
    row: PlannedWeight, trial: KernelTrial, config: CompileConfig, budget: AutotuneBudget
) -> PlannedWeight:
    """Plans what runs a weight by the table for its device; measures where that says nothing."""
    table = find_card_table(trial.weight)
    if isinstance(table, Refusal):
        return _measure_instead(row, trial, config, budget, table.sentence)
    line = find_table_row(row, table)
    if isinstance(line, Refusal):
        return _measure_instead(row, trial, config, budget, line.sentence)
    kernel, source = make_kernel(row, line), describe_source(table, line)
    if isinstance(kernel, Refusal):
        return _measure_instead(row, trial, config, budget, kernel.sentence)
    if kernel.name in config.exclude_kernels:
        return _measure_instead(row, trial, config, budget, f"{kernel.name} is excluded")
    if not is_worth(kernel, line.dense_ms / line.ratio, line.dense_ms):
        return row.run_dense(source, status=Status.TABLE)
    if not reproduces_dense(trial, kernel):
        return _measure_instead(row, trial, config, budget, explain_distrust([kernel]))
    return _run_sparse(row, trial.weight, kernel, Status.TABLE, source)


def _measure_instead(
    row: PlannedWeight,
    trial: KernelTrial,
    config: CompileConfig,
    budget: AutotuneBudget,
    why: str,
) -> PlannedWeight:
    """Plans what runs a weight that the table says nothing of, and says so in the reason."""
    measured_row = _select_candidate(row, trial, config, budget)
    return replace(measured_row, reason=f"{measured_row.reason} ({why})")


def _choose_setting(
    candidates: tuple[KernelConfig, ...], trial: KernelTrial, budget: AutotuneBudget
) -> KernelConfig | None:
    """Returns the setting of a pinned kernel: the first, or the fastest where it changes numbers.

    Those settings are not among the measured ones otherwise. None if all are wrong.
    """
    first = candidates[0]
    if not find_family(first.name).inexact or len(candidates) == 1:
        return first
    milliseconds = measure_kernels(trial, candidates, budget)
    if milliseconds is None:
        return first
    best = min(candidates, key=lambda kernel: milliseconds[str(kernel)])
    return None if milliseconds[str(best)] == math.inf else best


def _select_fastest(
    row: PlannedWeight,
    candidates: tuple[KernelConfig, ...],
    trial: KernelTrial,
    config: CompileConfig,
    budget: AutotuneBudget,
) -> PlannedWeight:
    milliseconds = measure_kernels(trial, candidates, budget)
    if milliseconds is None:
        spent = f"not measured: autotune_seconds={config.autotune_seconds:g} were spent"
        return row.run_dense(spent)
    dense_ms = milliseconds["dense"]
    best = min(candidates, key=lambda kernel: milliseconds[str(kernel)])
    best_ms = milliseconds[str(best)]
    if best_ms == math.inf:
        return row.run_dense(explain_distrust(candidates))
    times = KernelTimes(dense_ms, best_ms)
    if not is_worth(best, best_ms, dense_ms):
        reason = _add_doubts(f"{best.name} was not faster", best)
        return row.run_dense(reason, status=Status.MEASURED, times=times)
    return _run_sparse(row, trial.weight, best, Status.MEASURED, "fastest measured", times)


def is_worth(kernel: KernelConfig, sparse_ms: float, dense_ms: float) -> bool:
    """Returns whether a measured kernel is fast enough to take dense's place in a model."""
    return sparse_ms + find_family(kernel.name).call_ms < MARGIN * dense_ms


def explain_distrust(kernels: Sequence[KernelConfig]) -> str:
    """Returns why none of some kernels was believed, as a sentence."""
    names = " and ".join(dict.fromkeys(kernel.name for kernel in kernels))
    return f"{names} refused its size, or gave other numbers than dense"


def _list_candidates(
    row: PlannedWeight, weight: Tensor, config: CompileConfig, wanted: str
) -> tuple[KernelConfig, ...] | Refusal:
    """Returns the kernels that could run the weight, at least one, or why none can."""
    families = _list_families(weight, wanted)
    if isinstance(families, Refusal):
        return families
    dtypes = {problem.dtype for problem in row.problems}
    if len(dtypes) > 1:
        return Refusal("it runs in more than one dtype")
    dtype = dtypes.pop()
    size = weight.shape[0], weight[0].numel()
    reasons = {
        family: family.why_unavailable() or family.why_refused(row.pattern, *size, dtype)
        for family in families
    }
    if all(reasons.values()):
        return Refusal("; ".join(dict.fromkeys(filter(None, reasons.values()))))
    kernels = [
        kernel
        for family in families
        if not reasons[family]
        for kernel in family.list_candidates(row.pattern, dtype)
        if kernel.name not in config.exclude_kernels
    ]
    if wanted in ("auto", "sparse"):
        return tuple(kernels) or Refusal("every kernel for it is in exclude_kernels=")
    return tuple(kernel for kernel in kernels if kernel.name == wanted) or Refusal(
        f"{wanted!r}, asked by kernels=, does not run pattern {row.pattern} on {weight.device.type}"
    )


def _list_families(weight: Tensor, wanted: str) -> tuple[KernelFamily, ...] | Refusal:
    """Returns the families to choose from: the one that is named, or all that are exact."""
    families = find_families(weight.device.type)
    named = tuple(family for family in families if wanted in family.names)
    families = named or tuple(family for family in families if not family.inexact)
    if isinstance(weight, FakeTensor) or not families:
        return Refusal(f"no sparse kernel for {weight.device.type} tensors yet")
    return families


def _run_sparse(
    row: PlannedWeight,
    weight: Tensor,
    kernel: KernelConfig,
    status: Status,
    reason: str,
    times: KernelTimes | None = None,
) -> PlannedWeight:
    if inexact := find_family(kernel.name).inexact:
        reason = f"{reason}; it {inexact}"
    reason = _add_doubts(reason, kernel)
    dtype = row.problems[0].dtype
    weight_format = WeightFormat(
        row.pattern, None if dtype == weight.dtype else dtype, kernel.untiled
    )
    return row.run_sparse(kernel, weight_format, status=status, reason=reason, times=times)


def _add_doubts(reason: str, kernel: KernelConfig) -> str:
    doubts = find_family(kernel.name).describe_doubts()
    return f"{reason} ({doubts})" if doubts else reason


def select_training_kernel(
    row: PlannedWeight, weight: Tensor, config: CompileConfig
) -> PlannedWeight:
    """Plans whether a masked weight is multiplied sparse in training, where ``kernels`` says so.

    Args:
        row: The weight as planned so far.
        weight: Its values, which may be a FakeTensor.
        config: The user's options.

    Returns:
        ``row`` as it was where no kernel was asked for, else with kernel, status and reason.
    """
    wanted = config.find_kernel(row.name)
    if wanted in ("auto", "dense"):
        return row
    family = _find_training_family(row, weight, wanted)
    if isinstance(family, Refusal):
        return row.run_dense(family.sentence)
    dense = family.describe_backward(row.pattern, frozen=row.is_frozen)
    row = row.run_sparse(
        KernelConfig(family.names[0]),
        row.weight_format,
        status=Status.PINNED,
        reason="; ".join(filter(None, ("pinned by kernels=", dense))),
    )
    if row.frozen is None or family.layout_op is None:
        return row
    return replace(row, frozen=None, layout=family.layout_op(row.frozen, str(row.pattern)))


def prepare_training(rows: Sequence[PlannedWeight]) -> None:
    """Builds the kernels that planned weights run by in training."""
    uses = defaultdict[KernelFamily, list[tuple[Pattern, MatmulProblem, tuple[int, int]]]](list)
    for row in rows:
        if row.kernel is not None:
            shape = row.shape[0], math.prod(row.shape[1:])
            products = [(row.pattern, problem, shape) for problem in row.problems]
            uses[find_family(row.kernel.name)] += products
    for family, products in uses.items():
        family.prepare_training(products)


def _find_training_family(
    row: PlannedWeight, weight: Tensor, wanted: str
) -> KernelFamily | Refusal:
    """Returns the family whose training op multiplies by the weight, or why none can."""
    kernels = [family.names[0] for family in find_training_families()]
    if wanted != "sparse" and wanted not in kernels:
        others = " and ".join(map(repr, kernels))
        verb = "does" if len(kernels) == 1 else "do"
        return Refusal(f"{wanted!r} does not run in training, {others} {verb}")
    if isinstance(row.uses, Refusal):
        return row.uses
    families = [
        family
        for family in find_families(weight.device.type)
        if family.training_op is not None and wanted in ("sparse", family.names[0])
    ]
    if not families:
        return Refusal(f"no sparse product for training on {weight.device.type} tensors")
    if any(problem.kernel for problem in row.problems):
        return Refusal("no sparse convolution for training")
    reasons = {family: _why_not_in_training(family, row, weight) for family in families}
    able = [family for family, reason in reasons.items() if reason is None]
    if able:
        return able[0]
    fitting = [family for family in families if family.find_accepted(row.pattern) is not None]
    told = [reasons[family] for family in fitting or families]
    return Refusal("; ".join(dict.fromkeys(filter(None, told))))


def _why_not_in_training(family: KernelFamily, row: PlannedWeight, weight: Tensor) -> str | None:
    """Returns why a family's training op cannot multiply by a weight; None if it can."""
    reason, size = family.why_unavailable(), (weight.shape[0], weight[0].numel())
    for problem in row.problems:
        reason = reason or family.why_refused_in_training(row.pattern, *size, problem.dtype)
    return reason
