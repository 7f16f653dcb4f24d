"""``permute_channels``: exchanges channels of a model so that a pattern keeps more energy.

trace_aten      the call of the model as one graph of aten ops           aten_graph.py
Propagation     which channels are one, by a rule per op                 propagate.py, rules.py
find_couplings  the sets that may change places                          couplings.py
search_order    a better order of a set                                  search.py
apply_order     written into everything that the set lies in             apply_order.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...compiler.api import check_model
from ...compiler.lookup import iterate_sparse_forwards
from ...config import CompileConfig
from ...diffusion import evaluating
from ...errors import ConfigError, GraphError
from ...masks.nm_mask import nm_mask
from ...patterns import Pattern
from ...progress import announce, show_progress_bar
from ..batches import Batches, CalibrationBatch, list_batches
from ..targets import explain_call, find_targets
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

    The search is that of Pool & Yu 2021 ("Channel Permutations for N:M Sparsity"), with units of
    any pattern: exchanges of two channels at a time, and a few escapes from local optima. For a
    pattern whose rows share a mask, rows are permuted too.

    Args:
        model: A dense model, before ``compile``.
        pattern: What it will be pruned to, as in ``compile``.
        batches: Inputs of calls of the model, as in ``prune_one_shot``. The graph is that of the
            first; it must read every parameter.
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
        DataError: There are no batches, or the model cannot be called with one.
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
        expected = run_once(model, listed[0])
        captured, inputs = capture_call(model, listed[0].args, dict(listed[0].kwargs))
        targets = find_targets(model, config, listed[0], captured)
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
            difference = measure_difference(expected, run_once(model, listed[0]))
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


@torch.no_grad()
def run_once(model: nn.Module, batch: CalibrationBatch) -> list[Tensor]:
    """Returns the floating-point outputs of one call, the same for the same weights.

    Raises:
        DataError: The model cannot be called with the batch.
    """
    device = next(model.parameters()).device
    moved = batch.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            out = model(*moved.args, **moved.kwargs)
        except Exception as error:
            raise explain_call(model, batch, error) from error
    return [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]


def measure_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Returns the largest change of an output, over its largest magnitude.

    Raises:
        GraphError: It is more than rounding explains.
    """
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        size = float(old.abs().max()) if old.numel() else 0.0
        change = float((new.double() - old.double()).abs().max()) if old.numel() else 0.0
        share = change / size if size > 0 else change
        limit = TOLERANCES.get(old.dtype, 0.05)
        if not (share <= limit or (math.isnan(size) and math.isnan(change))):
            raise GraphError(
                f"permuted channels changed an output by {share:.1e} of its largest magnitude: "
                "the model was put back; this is a bug of this package, please report it"
            )
        worst = max(worst, share)
    return worst
