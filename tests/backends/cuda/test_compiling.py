"""The kernels compile for the GPU they are meant for, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.cuda.running import needs_triton


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_triton_kernels_compile_for_an_a100_and_an_h100(capability: str, tmp_path: Path) -> None:
    needs_triton()
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-m", "tests.backends.cuda.compile_kernels", capability.replace(".", "")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("kernels compiled for compute capability " + f"{capability}\n")
