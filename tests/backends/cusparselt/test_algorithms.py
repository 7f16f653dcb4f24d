"""The search for algorithms of cuSPARSELt in processes that may die."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
        ({0}, {2}, (0, 1, *range(3, 64)), [0, 1]),
        ({0, 1}, set(), (0,), [0, 1]),
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
        return SimpleNamespace(stdout=lines_of(range(start, 64), deadly=deadly, refused=refused))

    monkeypatch.setattr(algorithms.subprocess, "run", run)
    assert algorithms._try_in_processes("float16") == tuple(sound)
    assert seen == starts


def test_try_in_processes_where_none_can_be_started_keeps_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], **_: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(algorithms.subprocess, "run", run)
    assert algorithms._try_in_processes("float16") == (0,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_run_main_where_there_is_no_card_prints_no_algorithm() -> None:
    said = algorithms._run_main("float16", 0)
    assert not [word for word, _ in said if word == "sound"]
