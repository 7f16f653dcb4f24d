"""Times calls on a GPU: in turns, each with a cold L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from statistics import median
from typing import Any

import torch

from ..interleaved_timer import Calls, interleave

_WARMUP, _ROUNDS, _ISSUES = 3, 15, 10
_FLUSHED = 2  # times the L2 cache


def time_calls(calls: Calls, device: torch.device, *, graphs: bool) -> dict[str, float]:
    """Returns the median milliseconds of each call on the GPU.

    ``graphs``: the model will run under CUDA graphs, so that what a launch costs on the CPU does
    not count; else a call takes at least as long as the CPU needs to issue it.
    """
    times = {name: median(spans) for name, spans in sample_calls(calls, device).items()}
    if not graphs:
        with torch.cuda.device(device):
            times = {name: max(times[name], _time_issue(call)) for name, call in calls.items()}
    return times


def sample_calls(
    calls: Calls, device: torch.device, rounds: int = _ROUNDS
) -> dict[str, list[float]]:
    """Returns the milliseconds of each call on the GPU, by round, replayed as a CUDA graph."""
    with torch.cuda.device(device):
        for call in calls.values():
            for _ in range(_WARMUP):
                call()
        replays = {name: _capture(call) for name, call in calls.items()}
        return _time_replays(replays, device, rounds)


def _capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """Returns the call as a CUDA graph, so that the time between its launches is the GPU's own.

    A call that cannot be captured is returned as it is.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = call()
    except RuntimeError:
        return call

    def replay() -> Any:
        graph.replay()
        return out  # keeps the memory that the graph writes to

    return replay


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
