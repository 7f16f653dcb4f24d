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
