"""The progress bar of a fine-tune, with the rate of its steps and its last loss."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from tqdm.auto import tqdm

from .state import Run

LOG_BATCHES = 50
"""A line of the log is for so many batches, or fewer; the shown loss and rate are of as many."""


def format_recent_loss(run: Run) -> str:
    """Returns the mean of the last losses as text, "?" before the first."""
    losses = [total for total, _, _ in run.progress.losses[-LOG_BATCHES:]]
    return f"{sum(losses) / len(losses):.4f}" if losses else "?"


class TrainingBar(tqdm):  # type: ignore[type-arg]
    """A bar whose rate and remaining time are those of the steps, without the work in between."""

    rates: Sequence[float] = ()

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values that the bar shows."""
        values = dict(super().format_dict)
        if not self.rates:  # so that time spent compiling gives no estimate
            return {**values, "rate": None, "initial": values["n"]}
        return {**values, "rate": median(self.rates[-LOG_BATCHES:])}


def make_progress_bar(run: Run, progress: bool) -> TrainingBar:
    """Returns a bar that counts images and estimates when all will have been seen."""
    seen, images = run.progress.seen, run.config.images
    name = f"finetune {run.config.method}"
    bar = TrainingBar(total=images, initial=seen, unit="img", desc=name, disable=not progress)
    bar.rates = run.progress.rates
    return bar
