"""Milliseconds of calls on a GPU: in turns, each with a cold L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

Calls = Mapping[str, Callable[[], Any]]

_WARMUP, _ROUNDS, _ISSUES = 3, 15, 10
_FLUSHED = 2  # times the L2 cache


def interleaved(calls: Calls, device: torch.device, *, graphs: bool) -> dict[str, float]:
    """Median milliseconds of each call on the GPU.

    ``graphs``: the model will run under CUDA graphs, so that what a launch costs on the CPU does
    not count; else a call takes at least as long as the CPU needs to issue it.
    """
    found = {name: median(each) for name, each in sampled(calls, device).items()}
    if not graphs:
        with torch.cuda.device(device):
            found = {name: max(found[name], _issued(call)) for name, call in calls.items()}
    return found


def sampled(calls: Calls, device: torch.device, rounds: int = _ROUNDS) -> dict[str, list[float]]:
    """Milliseconds that each call takes on the GPU, round by round: replayed as a CUDA graph."""
    with torch.cuda.device(device):
        for call in calls.values():
            for _ in range(_WARMUP):
                call()
        ready = {name: _captured(call) for name, call in calls.items()}
        return _replayed(ready, device, rounds)


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, so that the time between its launches is the GPU's own.

    What cannot be captured is timed as it is.
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


def _replayed(calls: Calls, device: torch.device, rounds: int) -> dict[str, list[float]]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(_FLUSHED * cache, dtype=torch.int8, device=device)
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            flush.fill_(turn % 100)  # and while that runs, what follows is issued
            begin, end = _event(), _event()
            begin.record()
            calls[name]()
            end.record()
            spans[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in each] for name, each in spans.items()}


def _issued(call: Callable[[], Any]) -> float:
    """Milliseconds that the CPU needs to issue the call."""
    times = []
    for _ in range(_ISSUES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
