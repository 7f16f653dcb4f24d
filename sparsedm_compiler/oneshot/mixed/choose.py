"""``choose_patterns``: a pattern for every layer, so that the model suffers least within a budget.

list_candidates            the patterns that fit every weight               layer_costs.py
count_costs, time_costs    what each costs                                  layer_costs.py
measure_errors             what each does to the layer or the model         layer_errors.py
solve_budget               the best choice that the budget allows           solve_budget.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ...compiler.api import check_model
from ...compiler.lookup import iterate_sparse_forwards
from ...config import CompileConfig
from ...diffusion import evaluating
from ...errors import ConfigError
from ...masks.nm_mask import nm_mask
from ...patterns import Pattern
from ..batches import Batches, list_batches
from ..options import OneShotOptions
from ..targets import explain_call
from .layer_costs import count_costs, list_candidates, time_costs
from .layer_errors import measure_errors
from .pattern_choice import PatternChoice, choose_within, require_affordable
from .read_choice import SCORES


def choose_patterns(
    model: nn.Module,
    candidates: Sequence[str | Pattern],
    batches: Batches,
    *,
    macs: float | str | Pattern | None = None,
    milliseconds: float | str | Pattern | None = None,
    score: str = "output",
    keep_dense: str | Iterable[str] | Callable[[str], bool] = (),
    policy: str = "structural",
    method: str = "obs",
    passes: int = 4,
    memory: int = 4 << 30,
    output_batches: int = 4,
    autotune_seconds: float = 60.0,
    progress: bool = True,
) -> PatternChoice:
    """Chooses a pattern for every layer: the least error that a budget of the whole model allows.

    Every layer is pruned in one shot at every candidate, alone in the dense model, which is then
    as it was (or its weights are judged by gradients, see ``score``). The sum of errors is made
    least by dynamic programming. That layers differ in how much they can lose, and that a budget
    should go where it helps, is DominoSearch's idea (Sun et al. 2021); their errors are of
    magnitudes.

    Args:
        model: A dense model, before ``compile``.
        candidates: Patterns to choose from; one such as "1:1" leaves a layer dense.
        batches: Inputs of calls of the model, as in ``prune_one_shot``.
        macs: The budget: MACs of all convolutions and linear layers in a call like the first; a
            number, or a pattern, for as many as with that in all layers.
        milliseconds: The budget instead: measured times of the weights to prune, in a call like the
            first on this machine; a number, or a pattern, for as many as with that in all layers.
        score: "output": the error is that of the model's output, ``E|f' - f|^2 / E|f|^2``.
            "layer": that of the layer's own output, ``E|dW x|^2 / E|W x|^2``, which is quicker.
            "taylor": that of the model's output in first order, from one backward through every
            batch for all layers and candidates (Molchanov et al. 2019), which is quickest.
        keep_dense: Layers that stay dense, as in ``compile``.
        policy: Which layers are pruned, as in ``compile``.
        method: How layers are pruned, as in ``prune_one_shot``.
        passes: Passes over the batches, as in ``prune_one_shot``; all see the dense model.
        memory: Bytes that Hessians may take, as in ``prune_one_shot``.
        output_batches: How many of the batches "output" is measured on.
        autotune_seconds: The most seconds to measure kernels, with ``milliseconds``.
        progress: Whether to show a progress bar, on stderr.

    Returns:
        The choice; ``pattern`` and ``options`` of it are for ``compile`` and ``prune_one_shot``.

    Raises:
        PatternError: A pattern is misspelled.
        ConfigError: There is not one budget, it is less than the sparsest candidates cost, an
            option has an unknown value, nothing would be pruned, or the model is compiled.
        DataError: There are no batches, the model cannot be called with one, or the inputs of a
            layer hold NaN or Inf.
        MaskError: A weight holds NaN or Inf.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)])
        >>> x = torch.randn(64, 16)
        >>> choice = sdm.choose_patterns(
        ...     net, ["2:4", "1:4", "1:8"], [x], macs="1:4", progress=False
        ... )
        >>> choice.cost <= choice.budget == sdm.count_macs(net, x, pattern="1:4").sparse
        True
        >>> student = sdm.compile(net, choice.pattern, backend="eager", **choice.options)
    """
    check_model(model)
    budget = read_budget(macs, milliseconds)
    patterns = read_candidates(candidates)
    if score not in SCORES:
        raise ConfigError(f"score {score!r} is none of {', '.join(SCORES)}")
    if output_batches < 1:
        raise ConfigError(f"output_batches {output_batches} is not >= 1")
    chosen = OneShotOptions(method, None, passes=passes, memory=memory)
    if any(True for _ in iterate_sparse_forwards(model)):
        raise ConfigError(
            f"{type(model).__name__} is compiled, or has compiled parts: choose patterns before"
        )
    listed = list_batches(batches)
    config = CompileConfig.create(
        patterns[0], keep_dense=keep_dense, policy=policy, autotune_seconds=autotune_seconds
    )
    with evaluating(model):
        try:
            sites, targets = list_candidates(model, config, patterns, listed[0])
        except Exception as error:
            raise explain_call(model, listed[0], error) from error
        if not targets:
            raise ConfigError(f"no candidate would prune anything in {type(model).__name__}")
        for own in targets.values():
            nm_mask(own[0].weight, own[0].pattern, name=own[0].name)  # raises for NaN and Inf
        uniform = budget if isinstance(budget, Pattern) else None
        if macs is not None:
            costs = count_costs(sites, targets, uniform)
        else:
            timing = CompileConfig.create(None, mode="infer", autotune_seconds=autotune_seconds)
            costs = time_costs(model, listed[0], targets, uniform, timing)
        limit = costs.uniform if isinstance(budget, Pattern) else float(budget)
        assert limit is not None
        require_affordable(costs.unit, costs.fixed, costs.by_weight, limit)
        errors = measure_errors(
            model,
            listed,
            targets,
            chosen,
            score=score,
            tried=output_batches,
            progress=progress,
        )
    bound = config.bind([(name,) for name, _ in model.named_parameters()])
    return choose_within(
        limit,
        costs,
        errors,
        score=score,
        keep_dense=bound.dense_globs,
        policy=policy,
    )


def read_budget(
    macs: float | str | Pattern | None, milliseconds: float | str | Pattern | None
) -> float | Pattern:
    """Returns the budget: a number, or the pattern whose cost it is.

    Raises:
        ConfigError: There is none, there are two, or it is not > 0.
    """
    budgets = [budget for budget in (macs, milliseconds) if budget is not None]
    if len(budgets) != 1:
        raise ConfigError(
            "choose_patterns needs one budget: macs= or milliseconds=, a number or a pattern"
        )
    (budget,) = budgets
    if isinstance(budget, str | Pattern):
        return Pattern.parse(budget)
    if not 0 < budget < float("inf"):
        raise ConfigError(f"a budget of {budget} is not > 0")
    return float(budget)


def read_candidates(candidates: Sequence[str | Pattern]) -> list[Pattern]:
    """Returns the candidates without doubles. Raises ConfigError unless some would prune."""
    if isinstance(candidates, str | Pattern):
        raise ConfigError(f"candidates {candidates!r} are no list of patterns, e.g. ['2:4', '1:4']")
    patterns = [*dict.fromkeys(Pattern.parse(text) for text in candidates)]
    if not any(not pattern.is_dense for pattern in patterns):
        raise ConfigError("there is no candidate that prunes: give some, e.g. ['2:4', '1:4']")
    return patterns
