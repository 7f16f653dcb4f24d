"""Which calls the timer of GPUs measures in full; the clock itself needs a card."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from sparsedm_compiler.backends.cuda import timer

SCREENED = {"dense": 9.0, "fast": 1.0, "near": 1.14, "slow": 1.2, "slowest": 30.0}
AGAIN = {"dense": 8.0, "fast": 1.1, "near": 1.05}


@pytest.mark.parametrize("graphs", [True, False])
def test_time_calls_measures_the_fastest_of_the_screening_in_full(
    monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    rounds = []

    def replay(calls: dict[str, Callable[[], Any]], _: Any, count: int) -> dict[str, list[float]]:
        rounds.append((count, set(calls)))
        times = SCREENED if len(rounds) == 1 else AGAIN
        return {name: [times[name]] * count for name in calls}

    monkeypatch.setattr(timer.torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(timer, "_warm_up", dict)
    monkeypatch.setattr(timer, "_time_replays", replay)
    monkeypatch.setattr(timer, "_time_issue", lambda call: 1.07)
    times = timer.time_calls(
        dict.fromkeys(SCREENED, lambda: None), torch.device("cuda"), graphs=graphs
    )
    assert rounds[0][1] == set(SCREENED)
    assert rounds[1][1] == {"dense", "fast", "near"}
    assert rounds[0][0] < rounds[1][0]
    least = 0.0 if graphs else 1.07
    assert times == {name: max(least, ms) for name, ms in {**SCREENED, **AGAIN}.items()}
