"""``permute_channels``: exchanges channels of a model so that a pattern keeps more energy.

trace_aten      the call of the model as one graph of aten ops           aten_graph.py
Propagation     which channels are one, by a rule per op                 propagate.py, rules.py
find_couplings  the sets that may change places                          couplings.py
search_order    a better order of a set                                  search.py
apply_order     written into everything that the set lies in             apply_order.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...compiler.api import check_model
from ...compiler.lookup import iterate_sparse_forwards
from ...config import CompileConfig
from ...diffusion import evaluating
from ...errors import ConfigError, GraphError
from ...masks.nm_mask import nm_mask
from ...patterns import Pattern
from ...progress import announce, show_progress_bar
from ..batches import Batches, CalibrationBatch, list_batches
from ..outputs import pick_kinds, require_finite, run_once
from ..targets import find_targets
from .aten_graph import AtenGraph, capture_call, trace_aten
from .couplings import find_couplings
from .permutation_job import PermutationJob
from .permutation_report import PermutationReport
from .propagate import Propagation
from .rules import RULES
from .scores import check_score, score_weights
from .search import SearchOptions

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
"""The most that outputs may change, over their largest magnitude; 0.05 for other dtypes.

Parts of a float64 model may well run in float32. A wrong coupling changes far more.
"""


def permute_channels(
    model: nn.Module,
    pattern: str | Pattern,
    batches: Batches,
    *,
    score: str = "magnitude",
    keep_dense: str | Iterable[str] | Callable[[str], bool] = (),
    overrides: Mapping[str, str | Pattern] | None = None,
    policy: str = "structural",
    rounds: int = 100,
    escapes: int = 2,
    seed: int = 0,
    allow_unread: bool = False,
    progress: bool = True,
) -> PermutationReport:
    """Permutes channels of a dense model in place, so that a pattern keeps more of its weights.

    The model computes what it did, but for the order of sums: input channels of a layer change
    places together with the output channels that write them, the scales, biases and positions
    between, and every other reader. What belongs together is read from the graph of one call.
    Class, names and shapes stay, so ``compile``, ``prune_one_shot`` and ``save_pretrained`` work
    as before.

    What was made for the model as it was no longer fits: adapters and ControlNets, whose channels
    are in the old order.

    The search is that of Pool & Yu 2021 ("Channel Permutations for N:M Sparsity"), with units of
    any pattern: exchanges of two channels at a time, and a few escapes from local optima. For a
    pattern whose rows share a mask, rows are permuted too.

    Args:
        model: A dense model, before ``compile``.
        pattern: What it will be pruned to, as in ``compile``.
        batches: Inputs of calls of the model, as in ``prune_one_shot``. The graph is that of the
            first; it must read every parameter. That outputs stay is checked with the first batch
            of every kind (other inputs, shapes or Python values).
        score: "magnitude": energy is the sum of squares of weights. "wanda": of weights times the
            norm of their inputs over the batches.
        keep_dense: Layers that will stay dense, as in ``compile``.
        overrides: Other patterns for some layers, as in ``compile``.
        policy: Which layers will be pruned, as in ``compile``.
        rounds: How long to search: the most rounds for every set of channels, each of which pairs
            all groups at random and makes the best exchange of every pair.
        escapes: How often to leave a local optimum by random exchanges.
        seed: Of the random choices.
        allow_unread: Whether parameters that the call does not read are no error. Calls that do
            read them may then give other outputs.
        progress: Whether to show a progress bar, on stderr.

    Returns:
        A report: what moved, and of every weight the kept energy before and after, or why its
        input channels stay. ``str()`` is a table.

    Raises:
        PatternError: A pattern is misspelled.
        ConfigError: An option has an unknown value, nothing would be pruned, the model is compiled,
            its forward takes several graphs, or it has parameters that the call does not read.
        DataError: There are no batches, the model cannot be called with one, or its outputs hold
            NaN or Inf.
        MaskError: A weight holds NaN or Inf.
        GraphError: The outputs changed by more than rounding; the model is what it was.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(3)])
        >>> report = sdm.permute_channels(net, "2:4", [torch.randn(8, 16)], progress=False)
        >>> [(row.writers, row.readers) for row in report.rows]
        [(('0.weight',), ('1.weight',))]
        >>> report.kept_after > report.kept_before
        True
    """
    started = time.perf_counter()
    check_model(model)
    check_score(score)
    options = SearchOptions(rounds, escapes, seed)
    if rounds < 1 or escapes < 0:
        raise ConfigError(f"rounds {rounds} is not >= 1, or escapes {escapes} is not >= 0")
    listed = list_batches(batches)
    if any(True for _ in iterate_sparse_forwards(model)):
        raise ConfigError(
            f"{type(model).__name__} is compiled, or has compiled parts: permute its channels "
            "before compile"
        )
    choice = {"keep_dense": keep_dense, "overrides": overrides, "policy": policy}
    config = CompileConfig.create(pattern, **choice)
    with evaluating(model):
        kinds = pick_kinds(listed)
        expected = [run_once(model, batch) for batch in kinds]
        for outputs in expected:
            require_finite(model, outputs)
        first = listed[0].to_model(model)
        captured, inputs = capture_call(model, first.args, dict(first.kwargs))
        targets = find_targets(model, config, first, captured)
        for target in targets:
            nm_mask(target.weight, target.pattern, name=target.name)  # raises for NaN and Inf
        scored = score_weights(model, targets, listed, score, progress=progress)
        before = {name: weight.measure() for name, weight in scored.items()}
        with announce("finding the channels that go together"):
            graph = trace_aten(model, captured, inputs)
            require_read(model, graph, allow_unread)
            couplings = find_couplings(Propagation(graph).run(RULES))
        del captured, inputs
        tensors = dict(model.state_dict(keep_vars=True))
        tensors |= dict(model.named_parameters())
        job = PermutationJob(couplings, scored, tensors, options)
        try:
            total = job.count_rounds(job.group_sets())
            with show_progress_bar(total, unit="round", name="permute", shown=progress) as bar:
                rows = tuple(job.run(bar))
            difference = measure_difference(model, kinds, expected)
        except BaseException:
            job.undo()
            raise
    return PermutationReport(
        score, rows, job.explain_weights(before), difference, time.perf_counter() - started
    )


def require_read(model: nn.Module, graph: AtenGraph, allowed: bool) -> None:
    """Raises ConfigError for parameters that the call does not read, unless that is allowed."""
    read = {*graph.parameters.values()}
    unread = [name for name, _ in model.named_parameters() if name not in read]
    if unread and not allowed:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise ConfigError(
            f"the call does not read {', '.join(unread[:3])}{more}, so it is not known which "
            "channels they hold: give inputs that reach them, or allow_unread=True if nothing does"
        )


def measure_difference(
    model: nn.Module, kinds: Sequence[CalibrationBatch], before: Sequence[list[Tensor]]
) -> float:
    """Returns the largest change of an output, over its largest magnitude.

    Args:
        model: The model as permuted.
        kinds: The batches that it is called with; the graph was that of the first.
        before: Of every batch, the outputs before.

    Raises:
        GraphError: It is more than rounding explains.
    """
    worst = 0.0
    for batch, outputs in zip(kinds, before, strict=True):
        for old, new in zip(outputs, run_once(model, batch), strict=True):
            share = measure_change(old, new)
            if not share <= TOLERANCES.get(old.dtype, 0.05):
                reason = (
                    "this is a bug of this package, please report it"
                    if batch is kinds[0]
                    else f"the call with {batch.describe()} takes another path than the first"
                )
                raise GraphError(
                    f"permuted channels changed an output by {share:.1e} of its largest "
                    f"magnitude: the model was put back; {reason}"
                )
            worst = max(worst, share)
    return worst


def measure_change(old: Tensor, new: Tensor) -> float:
    """Returns the largest change of an element, over the largest magnitude."""
    if not old.numel():
        return 0.0
    size, change = float(old.abs().max()), float((new.double() - old.double()).abs().max())
    return change / size if size > 0 else change
