"""Groups of runs: smaller dense models, a study that time limits, one option at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .setting import Setting

if TYPE_CHECKING:
    from .plan import Budget

TIMED = "timed"
"""The one group of a study with a budget of minutes, see timed.py."""
RATE = 2e-3
"""The best learning rate of the sweep."""


def list_baseline_runs(budget: Budget) -> Iterator[Setting]:
    """Yields smaller dense models beside masked ones of as many MACs, at the best rate."""
    options = {"lr": RATE}
    curve = {"held_out_every": max(1, budget.images // 8)}
    curved = (budget.settled[0], budget.settled[-1])
    for seed in budget.seeds:
        yield Setting("baselines", "dense", None, seed, options)
        for pattern in budget.settled:
            traced = {**options, **(curve if pattern in curved else {})}
            yield Setting("baselines", "sparsedm", pattern, seed, traced)
            yield Setting("baselines", "ste", pattern, seed, traced)
            yield Setting("baselines", "asp", pattern, seed, {**options, "start": "obs"})
            yield Setting("baselines", "obs-distill", pattern, seed, options)
            yield Setting("baselines", "diff-pruning", pattern, seed, options)
            yield Setting("baselines", "narrow", pattern, seed, options)
    for pattern in budget.settled:
        yield Setting("baselines", "narrow-long", pattern, budget.seeds[0])


def list_timed_runs(budget: Budget) -> Iterator[Setting]:
    """Yields the runs of a study that time limits, in the order of their worth."""
    seed = budget.seeds[0]
    yield Setting(TIMED, "dense", None, seed)
    for pattern in budget.settled:
        yield Setting(TIMED, "obs-distill", pattern, seed)
        for method in ("asp", "sparsedm", "ste"):
            yield Setting(TIMED, method, pattern, seed)
    for pattern in budget.blocks:
        yield Setting(TIMED, "obs-distill", pattern, seed)
        yield Setting(TIMED, "asp", pattern, seed)


def list_sweep(budget: Budget) -> Iterator[Setting]:
    """Yields single changes to STE with a teacher, at 1:4 and 1:8; then longer runs."""
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"sr_ste_lambda": 1e-5},
        {"sr_ste_lambda": 2e-4},
        {"sr_ste_lambda": 1e-2, "sr_ste_form": "decoupled"},
        {"sr_ste_lambda": 1.0, "sr_ste_form": "decoupled"},
        {"beta": 0.0},
        {"beta": 1.0},
        {"lr": 2e-4},
        {"lr": 1e-3},
        {"lr": 2e-3},
    )
    for pattern in ("1:4", "1:8"):
        for change in changes:
            yield make_sweep_setting(budget, pattern, change)
    images = budget.images * budget.long
    for lam in (0.0, 2e-4):
        for lr in (5e-4, 1e-3):
            yield make_sweep_setting(
                budget, "1:8", {"sr_ste_lambda": lam, "lr": lr, "images": images}
            )


def make_sweep_setting(budget: Budget, pattern: str, change: Mapping[str, Any]) -> Setting:
    """Returns STE with a teacher, and one change."""
    options = {"sr_ste_lambda": 0.0, **change}
    return Setting("sweep", "sparsedm", pattern, budget.seeds[0], options)
