"""The search for algorithms of cuSPARSELt in processes that may die."""

from __future__ import annotations

import subprocess
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


def test_try_in_processes_where_one_hangs_keeps_those_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        start = int(command[-1])
        lines = lines_of(range(start, 64), deadly={4}, refused=set(range(9, 64))).encode()
        if start == 0:
            raise subprocess.TimeoutExpired(command, 60, output=lines)
        return SimpleNamespace(stdout=lines)

    monkeypatch.setattr(algorithms.subprocess, "run", run)
    assert algorithms._try_in_processes("float16") == (0, 1, 2, 3, 5, 6, 7, 8)


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
    said = algorithms._run_main("float16", 0)
    assert not [word for word, _ in said if word == "sound"]
