"""Times calls on a GPU: in turns, each with a cold L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from statistics import median
from typing import Any

import torch

from ..interleaved_timer import Calls, interleave

_WARMUP, _SCREENING, _ROUNDS, _ISSUES = 3, 3, 15, 10
_NEAR = 1.15
"""Calls that took up to this many times as long as the fastest of the screening go on."""
_FLUSHED = 2  # times the L2 cache


def time_calls(calls: Calls, device: torch.device, *, graphs: bool) -> dict[str, float]:
    """Returns the median milliseconds of each call on the GPU, "dense" among them.

    A few rounds of all tell which are worth the rounds of the last.

    ``graphs``: the model will run under CUDA graphs, so that what a launch costs on the CPU does
    not count; else a call takes at least as long as the CPU needs to issue it.
    """
    with torch.cuda.device(device):
        replays = _warm_up(calls)
        times = _compute_medians(_time_replays(replays, device, _SCREENING))
        fastest = min((ms for name, ms in times.items() if name != "dense"), default=0.0)
        near = {name for name, ms in times.items() if name == "dense" or ms <= _NEAR * fastest}
        finalists = {name: replay for name, replay in replays.items() if name in near}
        times |= _compute_medians(_time_replays(finalists, device, _ROUNDS))
        if not graphs:
            times = {name: max(times[name], _time_issue(call)) for name, call in calls.items()}
    return times


def _compute_medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(spans) for name, spans in samples.items()}


def sample_calls(
    calls: Calls, device: torch.device, rounds: int = _ROUNDS
) -> dict[str, list[float]]:
    """Returns the milliseconds of each call on the GPU, by round, replayed as a CUDA graph."""
    with torch.cuda.device(device):
        return _time_replays(_warm_up(calls), device, rounds)


def _warm_up(calls: Calls) -> dict[str, Callable[[], Any]]:
    """Returns the calls as CUDA graphs, which share one pool of memory: outputs lie on another."""
    for call in calls.values():
        for _ in range(_WARMUP):
            call()
    pool = torch.cuda.graph_pool_handle()
    return {name: _capture(call, pool) for name, call in calls.items()}


def _capture(call: Callable[[], Any], pool: Any) -> Callable[[], Any]:
    """Returns the call as a CUDA graph, so that the time between its launches is the GPU's own.

    A call that cannot be captured is returned as it is.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            call()  # other threads may go on as they like
    except RuntimeError:
        return call
    return graph.replay


def _time_replays(calls: Calls, device: torch.device, rounds: int) -> dict[str, list[float]]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(_FLUSHED * cache, dtype=torch.int8, device=device)
    values = cycle(range(100))

    def record(call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        flush.fill_(next(values))  # and while that runs, what follows is issued
        begin, end = _make_event(), _make_event()
        begin.record()
        call()
        end.record()
        return begin, end

    for call in calls.values():  # the first replay of a graph also uploads it
        call()
    torch.cuda.synchronize()
    spans = interleave(calls, record, range(rounds))
    torch.cuda.synchronize()
    return {
        name: [begin.elapsed_time(end) for begin, end in events] for name, events in spans.items()
    }


def _time_issue(call: Callable[[], Any]) -> float:
    """Returns the milliseconds that the CPU needs to issue the call."""
    times = []
    for _ in range(_ISSUES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return median(times)


def _make_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
