"""Times calls in turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import Any, TypeVar

Sample = TypeVar("Sample")
Calls = Mapping[str, Callable[[], Any]]

_LEAST_ROUNDS, _LEAST_SECONDS, _MOST_SECONDS = 5, 0.03, 1.0


def interleave(
    calls: Calls, clock: Callable[[Callable[[], Any]], Sample], rounds: Iterable[int]
) -> dict[str, list[Sample]]:
    """Returns one sample of every call per round; the order turns by one with each round.

    Args:
        calls: The calls by name.
        clock: Runs one call and returns its sample, such as its seconds.
        rounds: The numbers of the rounds, such as ``range(11)`` or ``count_rounds()``.

    Example:
        >>> interleave({"a": lambda: 1, "b": lambda: 2}, lambda call: call(), range(3))
        {'a': [1, 1, 1], 'b': [2, 2, 2]}
    """
    names = list(calls)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in rounds:
        for position in range(len(names)):
            name = names[(turn + position) % len(names)]
            samples[name].append(clock(calls[name]))
    return samples


def count_rounds() -> Iterator[int]:
    """Yields 0, 1, ... for at least 5 rounds and 0.03 seconds, and at most for about a second."""
    begin, turn = time.perf_counter(), 0
    while True:
        yield turn
        turn += 1
        spent = time.perf_counter() - begin
        if (turn >= _LEAST_ROUNDS and spent > _LEAST_SECONDS) or spent > _MOST_SECONDS:
            return


def time_on_host(calls: Calls) -> dict[str, float]:
    """Returns the median milliseconds of each call by the clock on the wall, after one warm-up."""
    samples = sample_on_host(calls, count_rounds())
    return {name: median(milliseconds) for name, milliseconds in samples.items()}


def sample_on_host(calls: Calls, rounds: Iterable[int]) -> dict[str, list[float]]:
    """Returns the milliseconds of each call by round, by the clock on the wall, warmed up once."""
    for call in calls.values():
        call()
    samples = interleave(calls, _measure_seconds, rounds)
    return {name: [1e3 * second for second in seconds] for name, seconds in samples.items()}


def _measure_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
