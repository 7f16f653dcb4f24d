"""Whole models: sparse inference, each layer gated, against Inductor; both under CUDA graphs.

Time is from the call to the end of the GPU's work, so what a call costs in Python counts, too. Each
pattern is timed beside the dense model in rounds of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import sparsedm_compiler as sdm

from .case import Case, Row, Tell
from .comparing import attempt, bind_call, compute_medians, compute_speedup, dense, sample_models
from .models import ENTRIES, NEEDS_DIFFUSERS, Call, open_model, per_model
from .plan import Plan
from .pruned import check_student, kernels_of, reasons_of, student_of

DTYPE = torch.bfloat16
PROFILED = 5
"""Calls that are profiled."""


def cases(plan: Plan, avoid: frozenset[str]) -> Iterator[Case]:
    """One per model and batch."""
    here = find_spec("diffusers") is not None
    models = (model for model in plan.models if here or model[0] not in NEEDS_DIFFUSERS)
    return per_model(models, partial(compare, plan=plan, avoid=avoid))


def compare(
    which: tuple[str, int], tell: Tell, *, plan: Plan, avoid: frozenset[str]
) -> Iterator[Row]:
    """The row of one model, with one more pattern each time."""
    torch.compiler.reset()
    name, batch = which
    entry = ENTRIES[name]
    row: Row = {"model": entry.title, "name": name, "batch": batch, "dtype": "bfloat16"}
    row |= {"stand_in": "stand-in" in entry.title, "patterns": {}}
    with torch.no_grad():
        model, call = open_model(name, batch, plan.device, DTYPE)
        compiled = dense(model, plan)
        bind_call(compiled, call)()
        yield row
        for text in plan.model_patterns:
            crumb = f"{name} batch {batch} at {text}"
            if crumb in avoid:
                row["patterns"][text] = {"wrong": True, "died": True}
                continue
            tell(crumb)
            build = partial(
                student_of, model, text, plan, policy=entry.policy, kernels=plan.kernels
            )
            calls = {"dense": bind_call(compiled, call)}
            cell = attempt(partial(time_student, build, model, call, calls, plan.seconds))
            row["patterns"][text] = cell
            print(format_row(row, text), flush=True)
            yield row
            if "ratio" in cell:
                cell["device"] = {
                    key: attempt(partial(profile_device, once)) for key, once in calls.items()
                }
                print(format_row(row, text), flush=True)
                yield row
            del calls


def time_student(
    build: Callable[[], nn.Module],
    model: nn.Module,
    call: Call,
    calls: dict[str, Callable[[], object]],
    seconds: float,
) -> dict[str, Any]:
    """What a student does and costs beside ``calls["dense"]``; its call joins them."""
    student = build()
    calls["sparse"] = bind_call(student, call)
    first = time_call(calls["sparse"])
    cell: dict[str, Any] = check_student(model, student, call)
    cell |= {
        "first_call_s": first,
        "timings": dict(sdm.explain(student).timings),
        "kernels": kernels_of(student),
        "dense_because": reasons_of(student),
    }
    if not cell["wrong"]:
        times = sample_models(calls, seconds)
        cell |= {"ratio": compute_speedup(times, "sparse"), "ms": compute_medians(times)}
    return cell


def time_call(once: Callable[[], object]) -> float:
    """The seconds of one call, to the end of the GPU's work."""
    start = time.perf_counter()
    once()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return round(time.perf_counter() - start, 2)


def profile_device(once: Callable[[], object]) -> dict[str, Any]:
    """The GPU's own milliseconds of one call, its launches, and its longest kernels."""
    if not torch.cuda.is_available():
        return {}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as seen:
        for _ in range(PROFILED):
            once()
        torch.cuda.synchronize()
    rows = [
        (event.key[:60], event.self_device_time_total / 1e3 / PROFILED, event.count / PROFILED)
        for event in seen.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    rows.sort(key=lambda row: -row[1])
    longest = [(name, round(ms, 4), count) for name, ms, count in rows[:12]]
    total = round(sum(ms for _, ms, _ in rows), 4)
    return {"ms": total, "launches": sum(count for *_, count in rows), "longest": longest}


def format_row(row: Row, text: str) -> str:
    """One pattern of a row in one line."""
    cell = row["patterns"][text]
    if "failed" in cell:
        return f"models: {row['model']}, batch {row['batch']}, {text}: {cell['failed']}"
    speed = f"{cell['ratio'][1]:.3f} times as fast" if "ratio" in cell else "wrong"
    first = f"first call {cell['first_call_s']} s"
    about = f"models: {row['model']}, batch {row['batch']}, {text}"
    device = {key: seen.get("ms") for key, seen in cell.get("device", {}).items()}
    return f"{about}: {speed}, {first}, ms {cell.get('ms')}, on the GPU {device}, {cell['kernels']}"
