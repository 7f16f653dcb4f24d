"""The scores that kept energy is the sum of squares of: magnitudes, or those times input norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, DataError
from ...progress import show_progress_bar
from ..batches import CalibrationBatch
from ..collect import collect_statistics, watch_uses
from ..layer_matrix import count_columns, from_matrix, iterate_rows
from ..targets import Target
from .arrangement import ScoredWeight

SCORES = ("magnitude", "wanda")


@dataclass(slots=True)
class InputNorms:
    """Sums of squares of the inputs of one weight, column by column."""

    name: str
    squares: Tensor
    count: float = 0.0

    def add(self, values: Mapping[str, Any], op: str, weight: float) -> None:
        """Adds the inputs of one product. Raises DataError where they hold NaN or Inf."""
        for x in iterate_rows(values, op, len(self.squares)):
            self.squares.add_(x.to(self.squares.device).square().sum(0), alpha=weight)
            self.count += weight * len(x)
        if not bool(self.squares.isfinite().all()):
            raise DataError(f"the inputs of {self.name!r} hold NaN or Inf in the calibration run")


def check_score(score: str) -> None:
    """Raises ConfigError for an unknown score."""
    if score not in SCORES:
        raise ConfigError(f"score {score!r} is none of {', '.join(SCORES)}")


def score_weights(
    model: nn.Module,
    targets: Sequence[Target],
    batches: list[CalibrationBatch],
    score: str,
    *,
    progress: bool,
) -> dict[str, ScoredWeight]:
    """Returns the scores of the weights to prune, by name.

    Raises:
        DataError: The inputs of a layer hold NaN or Inf.
    """
    scored = {}
    norms = measure_norms(model, targets, batches, progress) if score == "wanda" else {}
    for target in targets:
        wide = torch.float64 if target.weight.dtype == torch.float64 else torch.float32
        values = target.weight.detach().to(wide).clone()
        own = norms.get(target.name)
        if own is not None and own.count:
            row = (own.squares / own.count).sqrt().expand(len(values), -1)
            values *= from_matrix(row, values)
        scored[target.name] = ScoredWeight(target.name, target.pattern, values)
    return scored


def measure_norms(
    model: nn.Module, targets: Sequence[Target], batches: list[CalibrationBatch], progress: bool
) -> dict[str, InputNorms]:
    """Returns the norms of the inputs of all weights whose inputs can be seen."""
    uses = watch_uses(model, batches[0], list(targets))
    norms = {
        target.name: InputNorms(
            target.name,
            torch.zeros(count_columns(tuple(target.weight.shape)), device=target.weight.device),
        )
        for target in targets
        if target.name not in uses.hidden
    }
    with show_progress_bar(len(batches), unit="batch", name="norms", shown=progress) as bar:
        collect_statistics(model, batches, norms, uses, bar.update)
    return norms
