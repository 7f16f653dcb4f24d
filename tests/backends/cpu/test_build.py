"""Building: once, by many at once, for other instructions, or not at all but with a reason."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sparsedm_compiler.fileio import cache_folder
from tests.backends.cpu.cases import case
from tests.forked import ForkServer

IMPORTS = """
import hypothesis, pytest, torch
import torch._inductor.compile_fx
import sparsedm_compiler.backends.cpu.ops
import tests.backends.cpu.cases
"""
CHECK = """
import torch, torch.nn.functional as F
from sparsedm_compiler.backends.cpu import build, ops
from tests.backends.cpu.cases import case
from tests.backends.cpu.cases import Norm, check_conv, check_linear, check_norm_conv
"""
MANY = (
    CHECK
    + """
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        build.load_library().sdm_isa()
        os._exit(0)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
)
PARITY = (
    CHECK
    + """
print(build.load_library().sdm_isa().decode())
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
        norm = Norm(2, torch.randn(2, x.shape[1], 1, 1).to(dtype), torch.randn(x.shape[1]), None)
        check_norm_conv(held, x, norm, None, ((1, 2), (1, 1), (1, 1)), "none", 8)
"""
)
WITHOUT = """
import torch
from torch._inductor import config
config.cpp.cxx = ({cxx!r},)
from sparsedm_compiler import Pattern
from sparsedm_compiler.backends.cpu import build, ops
import sparsedm_compiler as sdm
print(build.why_unavailable())
net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
fast = sdm.compile(net, "2:4", mode="infer", backend="eager", kernels={{"*": "sparse"}})
fast(torch.randn(2, 8))
print(sdm.explain(fast))
"""


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs code in a process of its own that has built and loaded nothing yet."""
    with ForkServer(IMPORTS) as server:

        def run_with(code: str, cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
            env = {"SPARSEDM_CACHE": str(cache), **env}
            return server.run(f"import os\nos.environ.update({env!r})\n{code}")

        yield run_with


def test_load_library_in_many_processes_builds_one_library(run: Run, tmp_path: Path) -> None:
    done = run(MANY, tmp_path, SPARSEDM_CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0]"
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@pytest.mark.parametrize(("capability", "isa"), [("avx2", "avx2"), ("default", "portable")])
def test_kernels_of_other_instruction_sets_give_the_same(capability: str, isa: str) -> None:
    done = subprocess.run(  # torch reads the variable when it is imported
        [sys.executable, "-c", PARITY],
        capture_output=True,
        text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def test_compile_without_a_compiler_runs_dense_and_shows_the_reason(
    run: Run, tmp_path: Path
) -> None:
    done = run(WITHOUT.format(cxx="no-such-compiler"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no C++ compiler here to build CPU kernels with") == 2


def test_why_unavailable_with_a_failing_compiler_quotes_it(run: Run, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'out of cheese' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    done = run(WITHOUT.format(cxx=str(compiler)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot build the CPU kernels: out of cheese") == 2


def test_load_library_without_a_writable_cache_still_builds(run: Run, tmp_path: Path) -> None:
    taken, temporary = tmp_path / "file", tmp_path / "temporary"
    taken.write_text("")
    temporary.mkdir()
    code = f"import tempfile\ntempfile.tempdir = {str(temporary)!r}\n{CHECK}build.load_library()"
    done = run(code, taken / "below", SPARSEDM_CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    assert len(list(temporary.glob("sparsedm_compiler-*/kernels/*.so"))) == 1


def test_ops_without_a_compiler_run_the_reference(run: Run, tmp_path: Path) -> None:
    """Bytes packed elsewhere still run: through the reference."""
    held, path = case("2:4", 8, 20, torch.float32), str(tmp_path / "held.pt")
    torch.save((held.packed, held.masked), path)
    without = f"""
from torch._inductor import config
config.cpp.cxx = ("no-such-compiler",)
{CHECK}
assert build.why_unavailable() is not None
(packed, masked), x = torch.load({path!r}), torch.randn(3, 32)
out = ops.nm_linear_op(x, packed, torch.ones(20), 20, "silu", 4)
torch.testing.assert_close(out, F.silu(F.linear(x, masked, torch.ones(20))))
image = torch.randn(1, 32, 3, 3)
arguments = (None, 20, [1, 1], [1, 1], [0, 0], [1, 1], "none", 4)
out = ops.nm_conv2d_op(image, packed, *arguments)
torch.testing.assert_close(out, F.conv2d(image, masked[:, :, None, None]))
try:
    case("2:4", 8, 20, torch.float32)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = run(without, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("KernelError no C++ compiler here")


OUT_OF_MEMORY = (
    CHECK
    + """
import resource
from sparsedm_compiler import KernelError
held = case("2:4", 8, 20, torch.float32)
x = torch.randn(300, 32)
check_linear(held, x, None, "none", 4)
greedy = held.packed.clone()
greedy[:48].view(torch.int32)[9] = 2**31 - 4  # columns of a block: check() would refuse it
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for _ in range(3):
    try:
        ops.nm_linear_op(x, greedy, None, 20, "none", 4)
        print("it fits")
    except KernelError as error:
        print(error)
    junk = [torch.randn(32, 64) for _ in range(50)]
    check_linear(held, x, None, "none", 4)
    assert all(bool(each.abs().max() < 10) for each in junk)
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_nm_linear_out_of_memory_raises_and_runs_again(run: Run) -> None:
    done = run(OUT_OF_MEMORY, cache_folder(""))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a CPU kernel ran out of memory"] * 3
