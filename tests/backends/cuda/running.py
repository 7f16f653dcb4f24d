"""One battery for two machines: on CUDA where there is a GPU, and in Triton's interpreter anywhere.

Triton reads TRITON_INTERPRET once, when it is imported, so the interpreter is another process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsedm_compiler.triton_support import is_interpreted, why_unavailable

DEVICE = "cpu" if is_interpreted() else "cuda"


def on_device(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test that runs kernels on DEVICE."""
    reason = f"{why_unavailable()}; test_in_the_interpreter runs it"
    return pytest.mark.gpu(pytest.mark.skipif(why_unavailable() is not None, reason=reason)(test))


def on_cuda(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test that only a GPU can run."""
    here = torch.cuda.is_available() and not is_interpreted()
    return pytest.mark.gpu(pytest.mark.skipif(not here, reason="needs a CUDA device")(test))


def moved(tensor: Tensor) -> Tensor:
    """The tensor on DEVICE, with its strides."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return copy.copy_(tensor)


def run_interpreted(path: str) -> int:
    """How many tests of a file, of those marked ``on_device``, pass in the interpreter.

    Raises AssertionError with what pytest said if any fails.
    """
    needs_triton()
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "-m", "gpu", path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.search(r"(\d+) passed", run.stdout)
    assert found, run.stdout
    return int(found[1])


def needs_triton() -> None:
    """Skip a test where Triton is not installed: it has no wheels for every platform."""
    pytest.importorskip("triton", reason="there is no Triton here")
