"""One thread per test process (pytest-xdist runs two), and a torchvision that can be imported."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes beside xdist's

import pytest
import torch

from sparsedm_compiler.optional_deps import mend_torchvision
from tests.tiers import TESTS, UNMATCHED, is_slow, share_out, unmatched

gc.set_threshold(20_000, 20, 50)  # a capture makes ten thousands of objects, most of which stay
torch.set_num_threads(1)
mend_torchvision()  # peft and transformers import it on their own


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, object, object]:
    """Lets go of compiled graphs after each test, and of looking for garbage in what stays.

    A capture makes so many objects that full collections of all older ones take longer than it.
    """
    result = yield
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()
    return result


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the slow tests, and orders all; keeps the entries of SLOW that fit no test at all."""
    tests = [
        (item, item.path.relative_to(TESTS).as_posix())
        for item in items
        if item.path.is_relative_to(TESTS)
    ]
    for item, file in tests:
        if is_slow(file, item.name):
            item.add_marker(pytest.mark.slow)
    if config.args == config.getini("testpaths"):
        config.stash[UNMATCHED] = unmatched((file, item.name) for item, file in tests)
    items[:] = share_out(items)
