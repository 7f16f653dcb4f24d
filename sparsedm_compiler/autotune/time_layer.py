"""Times one linear layer at several patterns, as ``compile`` chooses its kernels, beside dense."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..backends.kernel_family import KernelConfig, MatmulProblem
from ..backends.registry import find_families
from ..passes import Refusal
from ..patterns import Pattern
from .linear_layers import Layer
from .measure import (
    AutotuneBudget,
    KernelTrial,
    bind_calls,
    make_input,
    measure_kernels,
    read_measured,
    run_dense,
)
from .select_kernel import explain_distrust, is_worth
from .side_by_side import compute_ratio

COST = 25
"""Measuring the kernels of a pattern takes about as long as so many calls of dense on a CPU."""


@dataclass(frozen=True, slots=True)
class LayerSetting:
    """The conditions under which layers are timed.

    Attributes:
        device: The device to run on.
        dtype: Dtype of weights and activations.
        patterns: The patterns to compare with dense.
        rounds: Number of rounds of the last comparison, at least 2.
    """

    device: torch.device
    dtype: torch.dtype
    patterns: tuple[Pattern, ...]
    rounds: int


@dataclass(frozen=True, slots=True)
class PatternTimes:
    """What was measured of one layer at one pattern.

    Attributes:
        kernel: The fastest kernel with its setting; None where none runs the layer.
        sparse_ms: Its median milliseconds.
        ratio: How many times faster than dense it is: quartiles of the ratios of the rounds.
        dense: Whether ``compile`` runs the layer dense, as no kernel is faster by enough.
        refusal: Why no kernel runs the layer; None where one does.
    """

    kernel: str | None = None
    sparse_ms: float | None = None
    ratio: tuple[float, float, float] | None = None
    dense: bool = True
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """What was measured of one layer.

    Attributes:
        layer: The layer.
        tokens: Rows of its input.
        dense_ms: Median milliseconds of the unpruned layer.
        patterns: What was measured by pattern, in the order of the setting.
        left_out: The patterns for which there was no time.
    """

    layer: Layer
    tokens: int
    dense_ms: float
    patterns: dict[str, PatternTimes]
    left_out: tuple[str, ...]


def list_kernels(
    pattern: Pattern, rows: int, cols: int, setting: LayerSetting
) -> tuple[KernelConfig, ...] | Refusal:
    """Returns the kernels that ``compile`` would measure for a weight, or why there are none.

    The reasons are of the families that take such a pattern, where there are any.
    """
    families = [family for family in find_families(setting.device.type) if not family.inexact]
    able = [family for family in families if family.find_accepted(pattern) is not None]
    kernels: list[KernelConfig] = []
    reasons: dict[str, None] = {}
    for family in able or families:
        reason = family.why_unavailable() or family.why_refused(pattern, rows, cols, setting.dtype)
        if reason is None:
            kernels += family.list_candidates(pattern, setting.dtype)
        else:
            reasons[reason] = None
    if kernels:
        return tuple(kernels)
    return Refusal("; ".join(reasons) or f"no sparse kernel for {setting.device.type} tensors yet")


@torch.no_grad()
def time_layer(
    layer: Layer, tokens: int, setting: LayerSetting, deadline: float
) -> LayerTimes | None:
    """Times dense and, at every pattern, the kernel that is fastest when measured.

    The product alone is timed: no bias, no activation. Kernels are first measured as in
    ``compile``, and kept on disk; then dense and the fastest of every pattern take turns, in rounds
    of their own, so that no ratio is high by having been chosen.

    Args:
        layer: The layer; its weight is random.
        tokens: Rows of its input.
        setting: Device, dtype, patterns and rounds.
        deadline: Nothing is begun that would take until later than this, by
            ``time.perf_counter()``.

    Returns:
        The times; None where there was no time for any pattern that has a kernel.
    """
    problem = MatmulProblem((tokens, layer.cols), setting.dtype)
    drawn = torch.randn(layer.rows, layer.cols, device=setting.device) / math.sqrt(layer.cols)
    weight, x = drawn.to(setting.dtype), make_input(problem, setting.device)
    dense = partial(run_dense, problem, x, weight)
    cost = COST * _measure_once(dense, setting.device)
    results: dict[str, PatternTimes] = {}
    calls: dict[str, Callable[[], Any]] = {"dense": dense}
    left_out = []
    for pattern in setting.patterns:
        text, name = str(pattern), f"{layer}, {tokens} tokens, at {pattern}"
        kernels = list_kernels(pattern, layer.rows, layer.cols, setting)
        if isinstance(kernels, Refusal):
            results[text] = PatternTimes(refusal=kernels.sentence)
            continue
        trial = KernelTrial(weight, name, pattern, (problem,), weight.is_cuda)
        times = _measure_in_time(trial, kernels, cost, deadline)
        if times is None:
            left_out.append(text)
            continue
        results[text], call = _bind_fastest(trial, kernels, times)
        if call is not None:
            calls[text] = call
    if left_out and len(calls) == 1:
        return None
    samples = find_families(setting.device.type)[0].sample_calls(
        calls, setting.device, setting.rounds
    )
    return _summarize(layer, tokens, results, samples, left_out)


def _measure_in_time(
    trial: KernelTrial, kernels: Sequence[KernelConfig], cost: float, deadline: float
) -> dict[str, float] | None:
    """Returns the times of the kernels; None where measuring them would take too long."""
    known = read_measured(trial, kernels)
    left = deadline - time.perf_counter()
    if known is not None:
        return known if left > 0 else None
    return measure_kernels(trial, kernels, AutotuneBudget(left)) if cost < left else None


def _bind_fastest(
    trial: KernelTrial, kernels: Sequence[KernelConfig], times: dict[str, float]
) -> tuple[PatternTimes, Callable[[], Any] | None]:
    """Returns the fastest kernel, whether it passes the gate, and its call; no call without one."""
    best = min(kernels, key=lambda kernel: times[str(kernel)])
    call = None if times[str(best)] == math.inf else bind_calls(trial, [best]).get(str(best))
    if call is None:
        return PatternTimes(refusal=explain_distrust(kernels)), None
    worth = is_worth(best, times[str(best)], times["dense"])
    return PatternTimes(kernel=str(best), dense=not worth), call


def _summarize(
    layer: Layer,
    tokens: int,
    results: dict[str, PatternTimes],
    samples: dict[str, list[float]],
    left_out: Sequence[str],
) -> LayerTimes:
    """Returns the results with medians and ratios of the samples."""
    complete = {
        text: PatternTimes(
            result.kernel,
            median(samples[text]),
            compute_ratio(samples["dense"], samples[text]),
            result.dense,
        )
        if text in samples
        else result
        for text, result in results.items()
    }
    return LayerTimes(layer, tokens, median(samples["dense"]), complete, tuple(left_out))


def _measure_once(call: Callable[[], Tensor], device: torch.device) -> float:
    """Returns the seconds of the second of two calls."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds
