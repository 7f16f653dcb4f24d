"""Measures dense and sparse kernels for one weight, interleaved; results are kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.custom_op import apply_activation
from ..backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from ..backends.packing import fold_weight
from ..backends.registry import find_families, find_family
from ..errors import KernelError
from ..fileio import cache_folder, write_atomically
from ..patterns import Pattern
from ..progress import announce

COLD_BYTES = 4 << 20
"""What is read between two calls of one kernel on a CPU: more than a second-level cache holds."""


@dataclass(slots=True)
class AutotuneBudget:
    """The seconds that one model may still spend on measuring."""

    seconds: float


@dataclass(frozen=True, slots=True)
class KernelTrial:
    """A weight and everything it multiplies, to be timed with several kernels.

    Attributes:
        weight: The dense weight.
        name: Its name, for the messages of errors.
        pattern: What it is pruned to.
        problems: One for every use of the weight.
        graphs: Whether the model will run under CUDA graphs, which hide what launches cost.
        fused: Whether the inner compiler makes one loop of an activation and what surrounds it,
            which costs next to nothing: it is then left out of all times. Dense's own would be
            that of eager, which is far slower on a CPU.
    """

    weight: Tensor
    name: str
    pattern: Pattern
    problems: tuple[MatmulProblem, ...]
    graphs: bool = False
    fused: bool = False


def measure_kernels(
    trial: KernelTrial, kernels: Sequence[KernelConfig], budget: AutotuneBudget
) -> dict[str, float] | None:
    """Returns milliseconds of "dense" and of every kernel, from disk if measured before.

    None where ``budget`` has no time left; infinite for a kernel that refuses the size or gives
    other numbers than dense.
    """
    path = _find_times(trial)
    cached = _read_complete(path, kernels)
    if cached is not None:
        return cached
    if budget.seconds <= 0:
        return None
    start = time.perf_counter()
    with torch.no_grad(), announce(f"choosing the kernel of {trial.name}"):
        measured = _measure(trial, kernels)
    budget.seconds -= time.perf_counter() - start
    write_atomically(path, json.dumps(measured).encode())
    return measured


def read_measured(trial: KernelTrial, kernels: Sequence[KernelConfig]) -> dict[str, float] | None:
    """Returns the times that ``measure_kernels`` would read from disk; None where it would measure.

    Measures nothing.
    """
    return _read_complete(_find_times(trial), kernels)


def reproduces_dense(trial: KernelTrial, kernel: KernelConfig) -> bool:
    """Returns whether a kernel runs the trial and gives dense's numbers, but for rounding."""
    with torch.no_grad():
        return str(kernel) in bind_calls(trial, [kernel])


def _measure(trial: KernelTrial, kernels: Sequence[KernelConfig]) -> dict[str, float]:
    calls, device = bind_calls(trial, kernels, cold=True), trial.weight.device
    if trial.fused and any(problem.act != "none" for problem in trial.problems):
        bare = tuple(replace(problem, act="none") for problem in trial.problems)
        sound = [kernel for kernel in kernels if str(kernel) in calls]
        calls = bind_calls(replace(trial, problems=bare), sound, cold=True)
    family = find_family(kernels[0].name)
    times = family.time_calls(calls, device, graphs=trial.graphs)
    return {**{str(kernel): math.inf for kernel in kernels}, **times}


def bind_calls(
    trial: KernelTrial, kernels: Sequence[KernelConfig], *, cold: bool = False
) -> dict[str, Callable[[], Any]]:
    """Returns the call of "dense", and of every kernel that reproduces it but for rounding.

    Not every kernel takes every size, which only running it tells, and none is believed before it
    has multiplied on this machine.

    cold: On a CPU, a small weight comes from far in every call, as in a model, where the other
    layers have run in between: calls take turns on copies.
    """
    weight, problems = trial.weight.detach(), trial.problems
    dtype = problems[0].dtype
    inputs = [make_input(problem, weight.device) for problem in problems]
    copies = _count_copies(weight, len(kernels) + 1) if cold else 1

    @cache
    def folded(kernel: KernelConfig | None) -> Tensor:
        return fold_weight(weight, WeightFormat(trial.pattern, dtype, kernel), trial.name)

    def copied(kernel: KernelConfig | None) -> Iterator[Tensor]:
        own = folded(kernel)
        return cycle([own] if copies == 1 else [own.clone() for _ in range(copies)])

    turns = copied(None)

    def dense() -> list[Tensor]:
        own = next(turns)
        return [run_dense(problem, x, own) for problem, x in zip(problems, inputs, strict=True)]

    expected, calls = dense(), {"dense": dense}
    refusals = KernelError if weight.device.type == "cpu" else Exception  # drivers' and Triton's
    _prepare(trial, kernels)
    for kernel in kernels:
        with suppress(refusals):
            call = _sparse_calls(trial, inputs, copied(kernel.untiled), kernel)
            inexact = bool(find_family(kernel.name).inexact)
            pairs = zip(call(), expected, strict=True)
            if all(_agree(out, wanted, inexact=inexact) for out, wanted in pairs):
                calls[str(kernel)] = call
    return calls


def _count_copies(weight: Tensor, calls: int) -> int:
    """Returns the copies with which calls in turns read more than stays in a cache."""
    if weight.device.type != "cpu":
        return 1
    return max(1, math.ceil(COLD_BYTES / max(1, weight.nbytes * calls // 4)))


def _prepare(trial: KernelTrial, kernels: Sequence[KernelConfig]) -> None:
    shape = trial.weight.shape[0], trial.weight[0].numel()
    for family in dict.fromkeys(find_family(kernel.name) for kernel in kernels):
        own = [kernel for kernel in kernels if kernel.name in family.names]
        family.prepare(own, trial.pattern, trial.problems, shape)


def _agree(out: Tensor, dense: Tensor, *, inexact: bool) -> bool:
    """Whether an output differs from dense's by no more than the order of sums explains.

    inexact: or than numbers of 8 bits do.
    """
    share = 2.0**-3 if inexact else 2.0**-5 if dense.dtype.itemsize == 2 else 1e-3
    largest = float(dense.abs().max()) if dense.numel() else 0.0
    return torch.allclose(out.float(), dense.float(), rtol=0, atol=share * largest)


def _sparse_calls(
    trial: KernelTrial, inputs: list[Tensor], packed: Iterator[Tensor], kernel: KernelConfig
) -> Callable[[], Any]:
    rows = trial.weight.shape[0]
    form = WeightFormat(trial.pattern, trial.problems[0].dtype, kernel.untiled)
    family = find_family(kernel.name)
    calls = [family.call(problem, form, kernel.tile) for problem in trial.problems]

    def call() -> list[Tensor]:
        own = next(packed)
        return [
            op(x, own, None, rows, **arguments)
            for (op, arguments), x in zip(calls, inputs, strict=True)
        ]

    return call


def run_dense(problem: MatmulProblem, x: Tensor, weight: Tensor) -> Tensor:
    """Runs the problem as the model does without a kernel."""
    if problem.kernel:
        out = F.conv2d(x, weight, None, problem.stride, problem.padding, problem.dilation)
    else:
        out = F.linear(x, weight)
    return apply_activation(out, problem.act)


def make_input(problem: MatmulProblem, device: torch.device) -> Tensor:
    """Returns a random input for the problem."""
    x = torch.randn(problem.inputs, dtype=torch.float32, device=device).to(problem.dtype)
    return x.contiguous(memory_format=torch.channels_last) if problem.channels_last else x


def _find_times(trial: KernelTrial) -> Path:
    return cache_folder("choices") / f"{_digest(trial)}.json"


def _digest(trial: KernelTrial) -> str:
    """Returns a hash of all that a time depends on."""
    weight = trial.weight
    machine = [family.describe_machine() for family in find_families(weight.device.type)]
    shape = tuple(weight.shape)
    pattern = str(trial.pattern)
    about = (machine, shape, pattern, trial.problems, trial.graphs, trial.fused, COLD_BYTES)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:24]


def _read_complete(path: Path, kernels: Sequence[KernelConfig]) -> dict[str, float] | None:
    """Returns the times in a file; None unless every kernel is among them."""
    times = _read_times(path)
    complete = times is not None and all(str(kernel) in times for kernel in kernels)
    return times if complete else None


def _read_times(path: Path) -> dict[str, float] | None:
    try:
        times = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    valid = isinstance(times, dict) and all(isinstance(ms, float) for ms in times.values())
    return times if valid and "dense" in times else None
