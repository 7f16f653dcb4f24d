"""One loop takes all samples: in turns, in an order that turns with every round."""

from __future__ import annotations

import pytest
import torch

from sparsedm_compiler.backends import interleaved_timer
from sparsedm_compiler.backends.interleaved_timer import (
    count_rounds,
    interleave,
    sample_on_host,
    time_on_host,
)
from sparsedm_compiler.backends.registry import find_family


def test_interleave_turns_the_order_by_one_per_round() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleave(calls, lambda call: call(), range(4))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert samples == {name: [None] * 4 for name in "abc"}


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [(0.0001, 301), (0.01, 5), (0.3, 4), (2.0, 1)],  # of one round: brief, fit, long, too long
)
def test_count_rounds_stops_by_rounds_and_by_seconds(
    seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(interleaved_timer.time, "perf_counter", lambda: now)
    turns = []
    for turn in count_rounds():
        turns.append(turn)
        now += seconds
    assert turns == list(range(rounds))


def test_time_on_host_runs_every_call_once_more_to_warm_up() -> None:
    counts = {"dense": 0, "sparse": 0}

    def count(name: str) -> None:
        counts[name] += 1

    times = time_on_host({name: lambda name=name: count(name) for name in counts})
    assert set(times) == {"dense", "sparse"}
    assert all(0 <= milliseconds < 1000 for milliseconds in times.values())
    assert counts["dense"] == counts["sparse"] >= 2


def test_sample_on_host_gives_milliseconds_of_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []

    def call() -> None:
        nonlocal now
        calls.append(now)
        now += 0.25

    monkeypatch.setattr(interleaved_timer.time, "perf_counter", lambda: now)
    assert sample_on_host({"dense": call}, range(3)) == {"dense": [250.0] * 3}
    assert len(calls) == 4  # one to warm up


@pytest.mark.parametrize(("device", "timed"), [("cuda", "on the card"), ("cpu", "on the host")])
def test_sample_calls_of_a_cuda_family_is_timed_where_it_runs(
    device: str, timed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample_on_card(calls: object, device: torch.device, rounds: int) -> object:
        return "on the card", device, rounds

    def sample_on_cpu(calls: object, rounds: range) -> object:
        return "on the host", torch.device("cpu"), len(rounds)

    monkeypatch.setattr("sparsedm_compiler.backends.cuda.family.sample_calls", sample_on_card)
    monkeypatch.setattr("sparsedm_compiler.backends.kernel_family.sample_on_host", sample_on_cpu)
    where = torch.device(device)
    assert find_family("cuda_vnm").sample_calls({}, where, 7) == (timed, where, 7)
    assert find_family("cpu_free").sample_calls({}, torch.device("cpu"), 7)[0] == "on the host"
