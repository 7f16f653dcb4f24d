"""The seconds that a model's first calls spend on each phase of compiling it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("search", "pack", "compile")
"""Measuring kernels, folding weights, and the inner compiler; TorchDynamo's own time is in none."""


class PhaseClock:
    """Sums of seconds by phase, over all graphs of a model.

    ``regions``: the repeated blocks that were compiled once, as sentences, or why there are none.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.regions: dict[str, None] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Adds the time inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
