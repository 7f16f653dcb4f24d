"""One thread per test process (pytest-xdist runs two), and a torchvision that can be imported."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from sparsedm_compiler.optional_deps import mend_torchvision

torch.set_num_threads(1)
mend_torchvision()  # peft and transformers import it on their own


@pytest.fixture(scope="module", autouse=True)
def _fresh() -> Iterator[None]:
    """Let go of what compilers hold after each file: a heap of gigabytes makes every gc slow.

    What stays even so, in caches, is not looked through again.
    """
    yield
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()
