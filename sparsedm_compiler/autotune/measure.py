"""Milliseconds of dense and of sparse kernels for one weight: measured in turns, kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.cuda import timer as cuda
from ..backends.custom_op import activate
from ..backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from ..backends.registry import find_families, find_family
from ..compiler.folded_weights import fold_weight
from ..errors import KernelError
from ..fileio import cache_folder, write_atomically
from ..patterns import Pattern

_ROUNDS = 5
_LEAST_SECONDS, _MOST_SECONDS = 0.03, 1.0


@dataclass(slots=True)
class AutotuneBudget:
    """The seconds that one model may still spend on measuring."""

    seconds: float


@dataclass(frozen=True, slots=True)
class KernelTrial:
    """What is measured: a weight, by its name, pruned to a pattern, and all that it has to do.

    ``graphs``: whether the model will run under CUDA graphs, which hide what launches cost.
    """

    weight: Tensor
    name: str
    pattern: Pattern
    works: tuple[MatmulProblem, ...]
    graphs: bool = False


def measure_kernels(
    subject: KernelTrial, kernels: Sequence[KernelConfig], search: AutotuneBudget
) -> dict[str, float] | None:
    """Milliseconds of "dense" and of every kernel, from disk if they were measured before.

    None where ``search`` has no time left; infinite for a kernel that is not to be believed.
    """
    path = cache_folder("choices") / f"{_digest(subject)}.json"
    found = _read(path)
    if found is not None and all(str(kernel) in found for kernel in kernels):
        return found
    if search.seconds <= 0:
        return None
    start = time.perf_counter()
    with torch.no_grad():
        measured = _measure(subject, kernels)
    search.seconds -= time.perf_counter() - start
    write_atomically(path, json.dumps(measured).encode())
    return measured


def reproduces_dense(subject: KernelTrial, kernel: KernelConfig) -> bool:
    """Whether a kernel runs the subject and gives dense's numbers, but for rounding."""
    with torch.no_grad():
        return str(kernel) in _calls(subject, [kernel])


def _measure(subject: KernelTrial, kernels: Sequence[KernelConfig]) -> dict[str, float]:
    calls, device = _calls(subject, kernels), subject.weight.device
    if device.type == "cuda":
        times = cuda.interleaved(calls, device, graphs=subject.graphs)
    else:
        times = interleaved(calls)
    return {**{str(kernel): math.inf for kernel in kernels}, **times}


def _calls(subject: KernelTrial, kernels: Sequence[KernelConfig]) -> dict[str, Callable[[], Any]]:
    """What "dense" does, and every kernel that takes the size and gives the same but for rounding.

    Not every kernel takes every size, which asking it tells, and none is believed before it has
    multiplied on this machine.
    """
    weight, works = subject.weight.detach(), subject.works
    dtype = works[0].dtype
    inputs = [make_input(work, weight.device) for work in works]

    @cache
    def folded(kernel: KernelConfig | None) -> Tensor:
        return fold_weight(weight, WeightFormat(subject.pattern, dtype, kernel), subject.name)

    def dense() -> list[Tensor]:
        return [run_dense(work, x, folded(None)) for work, x in zip(works, inputs, strict=True)]

    expected, calls = dense(), {"dense": dense}
    refusals = KernelError if weight.device.type == "cpu" else Exception  # drivers' and Triton's
    for kernel in kernels:
        with suppress(refusals):
            call = _sparse_calls(subject, inputs, folded(kernel.untiled), kernel)
            if all(map(_agree, call(), expected)):
                calls[str(kernel)] = call
    return calls


def _agree(out: Tensor, dense: Tensor) -> bool:
    """Whether an output differs from dense's by no more than the order of sums explains."""
    share = 2.0**-5 if dense.dtype.itemsize == 2 else 1e-3
    largest = float(dense.abs().max()) if dense.numel() else 0.0
    return torch.allclose(out.float(), dense.float(), rtol=0, atol=share * largest)


def _sparse_calls(
    subject: KernelTrial, inputs: list[Tensor], packed: Tensor, kernel: KernelConfig
) -> Callable[[], Any]:
    rows = subject.weight.shape[0]
    form = WeightFormat(subject.pattern, subject.works[0].dtype, kernel.untiled)
    family = find_family(kernel.name)
    calls = [family.call(work, form, kernel.tile) for work in subject.works]
    return lambda: [
        op(x, packed, None, rows, *how) for (op, how), x in zip(calls, inputs, strict=True)
    ]


def interleaved(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each call, taken in turns so that a busy machine slows all alike."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while True:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        spent, rounds = time.perf_counter() - begin, len(times["dense"])
        if (rounds >= _ROUNDS and spent > _LEAST_SECONDS) or spent > _MOST_SECONDS:
            return {name: 1e3 * median(each) for name, each in times.items()}


def run_dense(work: MatmulProblem, x: Tensor, weight: Tensor) -> Tensor:
    """What the model does without a kernel."""
    if work.kernel:
        out = F.conv2d(x, weight, None, work.stride, work.padding, work.dilation)
    else:
        out = F.linear(x, weight)
    return activate(out, work.act)


def make_input(work: MatmulProblem, device: torch.device) -> Tensor:
    """A random input for it."""
    x = torch.randn(work.inputs, dtype=torch.float32, device=device).to(work.dtype)
    return x.contiguous(memory_format=torch.channels_last) if work.channels_last else x


def _digest(subject: KernelTrial) -> str:
    """Of all that a time depends on."""
    weight = subject.weight
    machine = [family.machine() for family in find_families(weight.device.type)]
    shape = tuple(weight.shape)
    about = (machine, shape, str(subject.pattern), subject.works, subject.graphs)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:24]


def _read(path: Path) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and all(isinstance(ms, float) for ms in found.values())
    return found if good and "dense" in found else None
