"""Memory that a step frees serves the next one, and is given back at the end."""

from __future__ import annotations

import ctypes
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sparsedm_compiler.train import session
from sparsedm_compiler.train.allocator import keep_freed_memory
from tests.forked import ForkServer
from tests.train.cases import short

IMPORTS = "import tests.train.test_allocator"
CODE = """
from tests.train.test_allocator import count_faults
print(*count_faults())
"""
PAGE, SIZE, COUNT = resource.getpagesize(), 4 * 2**20, 40


def step() -> int:
    """Takes, writes and frees many blocks of 4 MiB; returns the page faults that this took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(COUNT)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def count_faults() -> list[int]:
    """Faults of a step by glibc's first setting, in the block, and of the first step behind it."""
    ctypes.CDLL(None).mallopt(-3, 128 * 1024)
    step()
    plain = step()
    with keep_freed_memory():
        step()
        step()
        kept = step()
    return [plain, kept, step()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_keep_freed_memory_of_a_step_serves_the_next() -> None:
    with ForkServer(IMPORTS) as server:
        plain, kept, after = map(int, server.run(CODE).stdout.split())
    pages = COUNT * SIZE // PAGE
    assert plain > pages / 2
    assert kept < pages / 10
    assert after > pages / 2


def test_finetune_on_a_cpu_keeps_freed_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []

    @contextmanager
    def watch() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    monkeypatch.setattr(session, "keep_freed_memory", watch)
    short("ste", tmp_path, images=8)
    assert entered == ["in", "out"]


def test_keep_freed_memory_without_glibc_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    with keep_freed_memory():
        pass
