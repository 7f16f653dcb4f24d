"""Samples of calls that are compared, taken in turns in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sparsedm_compiler.autotune.side_by_side import compute_ratio, sample_in_turns
from sparsedm_compiler.backends.cuda.timer import sample_calls

from .case import format_error
from .models import Call
from .plan import Plan

Calls = Mapping[str, Callable[[], object]]
Milliseconds = dict[str, list[float]]

_LEAST, _MOST = 7, 41
_WARMUP = 4  # CUDA graphs are recorded in the second call


def sample_ops(calls: Calls, plan: Plan, rounds: int) -> Milliseconds:
    """Of kernels: replayed CUDA graphs with a cold L2 cache; on a CPU by the clock on the wall."""
    if plan.device == "cuda":
        return sample_calls(calls, torch.device("cuda", 0), rounds)
    samples = sample_in_turns(calls, rounds=rounds)
    return {name: [1e3 * seconds for seconds in sample.wall] for name, sample in samples.items()}


def sample_sound_ops(calls: Calls, plan: Plan, rounds: int) -> tuple[Milliseconds, dict[str, str]]:
    """As ``sample_ops``, and why some could not be timed, as in a CUDA graph; not "dense"."""
    try:
        return sample_ops(calls, plan, rounds), {}
    except Exception:
        if is_device_lost():
            raise
    whys = {name: why_not(call, plan) for name, call in calls.items() if name != "dense"}
    broken = {name: why for name, why in whys.items() if why is not None}
    sound = {name: call for name, call in calls.items() if name not in broken}
    return sample_ops(sound, plan, rounds), broken


def why_not(call: Callable[[], object], plan: Plan) -> str | None:
    """Why a call cannot be timed; None if it can."""
    try:
        sample_ops({"dense": call}, plan, 1)
    except Exception as error:
        if is_device_lost():
            raise
        return format_error(error)
    return None


def sample_models(calls: Calls, seconds: float) -> Milliseconds:
    """Of whole calls, from the call to the end of the GPU's work; for about so many seconds."""
    first = sample_in_turns(calls, rounds=1, warmup=_WARMUP)
    round_seconds = sum(sample.wall[0] for sample in first.values())
    samples = sample_in_turns(
        calls, rounds=max(_LEAST, min(_MOST, int(seconds / round_seconds))), warmup=0
    )
    return {name: [1e3 * one for one in sample.wall] for name, sample in samples.items()}


def compute_speedup(
    times: Milliseconds, name: str, over: str = "dense"
) -> tuple[float, float, float]:
    """How many times faster ``name`` is: quartiles of the ratios of the rounds."""
    return compute_ratio(times[over], times[name])


def compute_medians(times: Milliseconds) -> dict[str, float]:
    """The median milliseconds of each."""
    return {name: median(values) for name, values in times.items()}


def bind_call(run: nn.Module | Callable[..., Any], call: Call) -> Callable[[], object]:
    """The call of a model; what it returns is dropped, as CUDA graphs want it."""
    args, kwargs = call

    def once() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        run(*args, **kwargs)

    return once


def dense(model: nn.Module, plan: Plan) -> Any:
    """The model as torch compiles it best: Inductor with CUDA graphs."""
    if plan.compiled:
        return torch.compile(model, mode="reduce-overhead")
    return torch.compile(model, backend="eager")


def output(run: nn.Module, call: Call) -> Tensor:
    """What a model returns, as one tensor."""
    args, kwargs = call
    out = run(*args, **kwargs)
    value: Tensor = out if isinstance(out, Tensor) else out.sample
    return value


def error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact||; infinite for NaN."""
    exact = exact.float()
    distance = float((out.float() - exact).norm() / exact.norm())
    return distance if distance == distance else float("inf")


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a measurement finds, or {"failed": why}, so that what comes after it is measured, too.

    Raises where the GPU is lost: then nothing can come after it in this process.
    """
    try:
        return measure()
    except Exception as bug:
        if is_device_lost():
            raise
        print(f"failed: {format_error(bug)}", flush=True)
        return {"failed": format_error(bug)}


def is_device_lost() -> bool:
    """Whether the GPU can be used no more by this process."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def free_memory() -> None:
    """Give back the memory of what was compared."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
