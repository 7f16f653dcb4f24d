"""Building: once, by many at once, for other instructions, or not at all but with a reason."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import torch, torch.nn.functional as F
from sparsedm_compiler.backends.cpu import library, ops, packed
from tests.backends.cpu.cases import case
from tests.backends.cpu.test_kernels import check_linear, check_conv
"""
PARITY = (
    CHECK
    + """
print(library.library().sdm_isa().decode())
for text in ("2:4", "1:8", "1:4x6", "1:8x16"):
    for dtype in (torch.float32, torch.bfloat16):
        for act in ("none", "gelu", "gelu_tanh", "silu"):
            held = case(text, 11, 37, dtype)
            x = torch.randn(19, held.masked.shape[1]).to(dtype)
            check_linear(held, x, torch.randn(len(held.masked)), act, 8)
        held = case(text, 2, 37, dtype, (3, 3))
        for form in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, held.masked.shape[1], 9, 12).to(dtype).to(memory_format=form)
            check_conv(held, x, None, ((1, 2), (1, 1), (1, 1)), "none", 8)
"""
)
WITHOUT = """
import torch
from torch._inductor import config
config.cpp.cxx = ({cxx!r},)
from sparsedm_compiler import Pattern
from sparsedm_compiler.backends.cpu import library, ops, packed
import sparsedm_compiler as sdm
print(library.unavailable())
net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
fast = sdm.compile(net, "2:4", mode="infer", inner="eager", kernels={{"*": "sparse"}})
fast(torch.randn(2, 8))
print(sdm.explain(fast))
"""


def run(code: str, cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, "SPARSEDM_CACHE": str(cache), **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=full)


def test_many_processes_build_at_once(tmp_path: Path) -> None:
    code = CHECK + "print(library.library().sdm_isa())"
    env = {**os.environ, "SPARSEDM_CACHE": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL)
        for _ in range(4)
    ]
    assert [process.wait() for process in runs] == [0] * 4
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@pytest.mark.parametrize(("capability", "isa"), [("avx2", "avx2"), ("default", "portable")])
def test_other_instructions_give_the_same(capability: str, isa: str, tmp_path: Path) -> None:
    done = run(PARITY, tmp_path, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def test_without_a_compiler_the_reason_is_shown_and_dense_runs(tmp_path: Path) -> None:
    done = run(WITHOUT.format(cxx="no-such-compiler"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no C++ compiler here to build CPU kernels with") == 2


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'out of cheese' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    done = run(WITHOUT.format(cxx=str(compiler)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot build the CPU kernels: out of cheese") == 2


def test_a_cache_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    done = run(CHECK + "print(library.library().sdm_isa())", taken / "below")
    assert done.returncode == 0, done.stderr
