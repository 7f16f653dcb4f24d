"""``StepClock``: the time of training steps, apart from compiling and from all work in between."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lap:
    """Steps that were timed together.

    ``images``: trained on. ``seconds``: without compiling. ``compiling``: seconds spent on that.
    """

    images: int
    seconds: float
    compiling: float

    @property
    def rate(self) -> float | None:
        """Images per second; None where the steps were compiled first, or none was taken."""
        return None if self.compiling or not self.images else self.images / max(self.seconds, 1e-9)


class StepClock:
    """Times steps from one ``start`` to the next ``stop``.

    Between the two lies all that every step needs, the wait for its data too. On a GPU a step goes
    on after its call: call ``stop`` when the device is known to have finished.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begins a lap."""
        self._started, self._images, self._compiling = time.perf_counter(), 0, 0.0

    def count(self, images: int, compiling: float) -> None:
        """Counts a step on ``images``, of which so many seconds were spent compiling."""
        self._images += images
        self._compiling += compiling

    def stop(self) -> Lap:
        """Returns the lap, and begins the next one."""
        passed = time.perf_counter() - self._started
        lap = Lap(self._images, max(passed - self._compiling, 0.0), self._compiling)
        self.start()
        return lap
