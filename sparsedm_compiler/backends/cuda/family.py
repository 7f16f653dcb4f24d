"""The base of families whose kernels run on NVIDIA GPUs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..kernel_family import KernelFamily
from .device import describe_machine, find_device, list_triton
from .timer import sample_calls, time_calls


class CudaFamily(KernelFamily):
    """Kernels on NVIDIA GPUs: they are timed on the device, and depend on it and on torch."""

    device = "cuda"
    call_ms = 0.0015  # in a model on an H200, beside libraries' kernels that overlap (docs/results)

    def describe_machine(self) -> tuple[Any, ...]:
        folder = Path(inspect.getfile(type(self))).parent
        return *describe_machine(), *list_triton().values(), hash_sources(folder)

    def identify_card(self) -> tuple[str, str] | None:
        device = find_device()
        return None if device is None else (device.name, ".".join(map(str, device.capability)))

    def time_calls(
        self, calls: Mapping[str, Callable[[], Any]], device: torch.device, *, graphs: bool
    ) -> dict[str, float]:
        if device.type != "cuda":  # tests run the references of the ops on a CPU
            return KernelFamily.time_calls(self, calls, device, graphs=graphs)
        return time_calls(calls, device, graphs=graphs)

    def sample_calls(
        self, calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int
    ) -> dict[str, list[float]]:
        if device.type != "cuda":
            return KernelFamily.sample_calls(self, calls, device, rounds)
        return sample_calls(calls, device, rounds)


@cache
def hash_sources(folder: Path) -> str:
    """Returns a hash of the sources of a family and of all: times of other kernels do not count."""
    digest = hashlib.sha256()
    for path in sorted(p for root in {folder, Path(__file__).parent} for p in root.iterdir()):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
