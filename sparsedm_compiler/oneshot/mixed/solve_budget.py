"""The choice of one candidate for every layer, with the least error within a budget.

A knapsack with multiple choice, solved by dynamic programming on a budget cut into steps. Costs are
rounded down to steps, and of the solutions for a few steps less the best that is really within the
budget is taken; what it leaves is spent at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STEPS = 20_000
"""Steps of the budget; 100 for every layer where that is more."""

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]


def solve_budget(errors: Sequence[Numbers], costs: Sequence[Numbers], budget: float) -> list[int]:
    """Chooses a candidate for every layer.

    Args:
        errors: Of every layer, the error of every candidate.
        costs: Of every layer, the cost of every candidate, >= 0.
        budget: The most that all layers may cost together.

    Returns:
        Of every layer, the number of the candidate. Costs never exceed the budget; the sum of
        errors is the least but for the rounding to steps.

    Raises:
        ValueError: The cheapest candidates cost more than the budget.
    """
    cheapest = [int(own.argmin()) for own in costs]
    if sum(own[k] for own, k in zip(costs, cheapest, strict=True)) > budget:
        raise ValueError("the budget is less than the cheapest candidates cost")
    base = sum(float(own.min()) for own in costs)
    room = budget - base
    steps = max(STEPS, 100 * len(costs))
    if room <= 0:
        return _improve(errors, costs, budget, cheapest)
    best = np.zeros(steps + 1)
    choices = []
    for layer_errors, layer_costs in zip(errors, costs, strict=True):
        extra = np.floor((layer_costs - layer_costs.min()) / room * steps + 1e-9).astype(np.int64)
        options = np.full((len(extra), steps + 1), np.inf)
        for k, shift in enumerate(extra):
            if shift <= steps:
                options[k, shift:] = best[: steps + 1 - shift] + layer_errors[k]
        choices.append((options.argmin(0), extra))
        best = options.min(0)
    for less in range(len(costs) + 1):
        chosen = _trace_back(choices, steps - less)
        if sum(float(own[k]) for own, k in zip(costs, chosen, strict=True)) <= budget:
            return _improve(errors, costs, budget, chosen)
    return _improve(errors, costs, budget, cheapest)


def _trace_back(choices: Sequence[tuple[Counts, Counts]], left: int) -> list[int]:
    """Returns the best candidates of all layers that cost at most ``left`` steps."""
    chosen = []
    for numbers, extra in reversed(choices):
        k = int(numbers[left])
        chosen.append(k)
        left -= int(extra[k])
    return chosen[::-1]


def _improve(
    errors: Sequence[Numbers], costs: Sequence[Numbers], budget: float, chosen: list[int]
) -> list[int]:
    """Spends what rounding left: single changes, that with the largest gain first."""
    chosen = [*chosen]
    while True:
        left = budget - sum(float(own[k]) for own, k in zip(costs, chosen, strict=True))
        best = (0.0, 0, 0)
        for layer, now in enumerate(chosen):
            gains = errors[layer][now] - errors[layer]
            gains = np.where(costs[layer] - costs[layer][now] <= left, gains, -np.inf)
            k = int(gains.argmax())
            best = max(best, (float(gains[k]), layer, k))
        if best[0] <= 0:
            return chosen
        chosen[best[1]] = best[2]
