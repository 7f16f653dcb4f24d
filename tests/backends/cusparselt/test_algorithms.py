"""The search for algorithms of cuSPARSELt in processes that may die."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsedm_compiler.backends.cuda.device import CudaDevice
from sparsedm_compiler.backends.cusparselt import algorithms


def lines_of(tried: range, *, deadly: set[int], refused: set[int]) -> str:
    """What a process prints that tries these, up to the one that it dies of."""
    lines = []
    for number in tried:
        lines.append(f"begin {number}")
        if number in deadly:
            return "\n".join(lines)
        lines += [] if number in refused else [f"sound {number}"]
    return "\n".join([*lines, "end"])


@pytest.mark.parametrize(
    ("deadly", "refused", "sound", "starts"),
    [
        (set(), set(range(5, 64)), range(5), [0]),
        (set(range(36, 64)), set(), range(36), [0, 37]),
        ({3}, set(range(8, 64)), (0, 1, 2, 4, 5, 6, 7), [0, 4]),
        ({0}, {2}, (1, *range(3, 64)), [0, 1]),
        (set(), set(range(64)), (), [0]),
        ({0, 1}, set(), None, [0, 1]),
    ],
)
def test_try_in_processes_leaves_out_what_kills_one(
    monkeypatch: pytest.MonkeyPatch,
    deadly: set[int],
    refused: set[int],
    sound: Any,
    starts: list[int],
) -> None:
    seen = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        start = int(command[-1])
        seen.append(start)
        lines = lines_of(range(start, 64), deadly=deadly, refused=refused)
        return SimpleNamespace(stdout=lines.encode())

    monkeypatch.setattr(algorithms.subprocess, "run", run)
    expected = None if sound is None else tuple(sound)
    assert algorithms._try_in_processes("float16") == expected
    assert seen == starts


@pytest.mark.parametrize(
    ("hangs", "begun", "sound", "starts"),
    [
        (1, {0: 4}, (*range(9),), [0, 4]),  # the machine was busy
        (2, {0: 4, 4: 4}, (0, 1, 2, 3, 5, 6, 7, 8), [0, 4, 5]),
        (1, {0: -1}, (*range(9),), [0, 0]),
        (2, {0: -1}, None, [0, 0]),
        (3, {0: 4, 4: -1}, None, [0, 4, 4]),
    ],
)
def test_try_in_processes_where_time_is_up_tries_that_algorithm_once_more(
    monkeypatch: pytest.MonkeyPatch,
    hangs: int,
    begun: dict[int, int],
    sound: tuple[int, ...] | None,
    starts: list[int],
) -> None:
    """``begun``: by start, the algorithm that is under way when the time is up."""
    seen = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        start = int(command[-1])
        seen.append(start)
        hung = {begun[start]} if len(seen) <= hangs else set()
        lines = lines_of(range(start, 64), deadly=hung, refused=set(range(9, 64))).encode()
        if hung:
            raise subprocess.TimeoutExpired(command, 60, output=b"" if hung == {-1} else lines)
        return SimpleNamespace(stdout=lines)

    monkeypatch.setattr(algorithms.subprocess, "run", run)
    assert algorithms._try_in_processes("float16") == sound
    assert seen == starts


def test_find_algorithms_is_asked_of_the_card_by_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running, most = 0, 0

    def run(*_: Any, **__: Any) -> SimpleNamespace:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return SimpleNamespace(stdout=lines_of(range(64), deadly=set(), refused=set()).encode())

    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    monkeypatch.setattr(algorithms.subprocess, "run", run)
    find = partial(algorithms._find_algorithms.__wrapped__, torch.float16)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(find, [CudaDevice("a card", (9, 0))] * 4)]
    assert (found, most) == ([tuple(range(64))] * 4, 1)


@pytest.mark.parametrize("failure", [OSError("no more processes"), "killed"])
def test_find_algorithms_where_none_could_be_tried_asks_again_another_time(
    failure: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        if isinstance(failure, OSError):
            raise failure
        return SimpleNamespace(stdout=b"begin 0\n" if command[-1] == "0" else b"")

    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    card = CudaDevice("a card", (9, 0))
    monkeypatch.setattr(algorithms.subprocess, "run", run)

    def find(dtype: torch.dtype) -> tuple[int, ...]:
        found: tuple[int, ...] = algorithms._find_algorithms.__wrapped__(dtype, card)
        return found

    assert find(torch.float16) == (0,)
    assert not [*tmp_path.rglob("*.json")]
    failure = "none"
    lines = lines_of(range(64), deadly=set(), refused={0, *range(3, 64)}).encode()
    monkeypatch.setattr(
        algorithms.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=lines)
    )
    assert find(torch.float16) == (0, 1, 2)
    monkeypatch.delattr(algorithms.subprocess, "run")
    assert find(torch.float16) == (0, 1, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_run_main_where_there_is_no_card_prints_no_algorithm() -> None:
    assert not algorithms._run_main("float16", 0).sound
