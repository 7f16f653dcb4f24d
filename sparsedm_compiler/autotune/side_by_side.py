"""Times candidates side by side: every one once per round, in a new order in every round."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends.interleaved_timer import interleave


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds of every round.

    Attributes:
        wall: By the clock on the wall.
        cpu: CPU time of this process.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def of(self, clock: str) -> list[float]:
        """Returns the seconds by "wall" or "cpu"."""
        return {"wall": self.wall, "cpu": self.cpu}[clock]


def sample_in_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2, again: bool = False
) -> dict[str, Samples]:
    """Returns samples of every call, taken in turns so that all of them meet the same machine.

    again: Every sample is of a second call, which finds the caches as a first left them: as models
    are called that sample images.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds = interleave(calls, time_second_call if again else time_call, range(rounds))
    return {
        name: Samples([wall for wall, _ in pairs], [cpu for _, cpu in pairs])
        for name, pairs in seconds.items()
    }


def time_call(call: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds on the wall and of CPU time of one call, with the accelerator's work."""
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    _wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def time_second_call(call: Callable[[], object]) -> tuple[float, float]:
    """Returns what ``time_call`` does of the second of two calls."""
    call()
    return time_call(call)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compute_ratio(of: list[float], over: list[float]) -> tuple[float, float, float]:
    """Returns the quartiles (25 %, median, 75 %) of ``of / over``, round by round."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(of, over, strict=True)], n=4, method="inclusive"
    )
    return low, middle, high


def format_ratio(quartiles: tuple[float, float, float]) -> str:
    """Returns a ratio as text: the median, and the quartiles in brackets."""
    low, middle, high = quartiles
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Returns the facts about this machine that a measured number needs beside it.

    ``device``: what ran; None for the current card where there is one.
    """
    card = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(device) if card else None,
        "load": list(os.getloadavg()),
    }


def format_machine(facts: Mapping[str, Any]) -> str:
    """Returns processor, threads, torch version and load as text."""
    processor = facts["gpu"] or f"{facts['processor']}, {facts['cpu']}"
    return (
        f"{processor}, {facts['threads']} of {facts['cores']} threads, torch {facts['torch']}, "
        f"load {facts['load'][0]:.1f}"
    )
