"""The kernels of vnm.cu run on the CPU, thread by thread (emulator.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from sparsedm_compiler.backends.cpp_compiler import find_compiler
from sparsedm_compiler.backends.vnm.launch import HERE, KernelBuild, LaunchArguments

_TESTS = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC")

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")


@cache
def library(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """The emulated kernels as these macros make them."""
    folder = Path(tempfile.mkdtemp())
    target = folder / "emulated.so"
    compiler = find_compiler()
    assert compiler is not None
    defined = [f"-D{name}={value}" for name, value in macros]
    command = [
        compiler,
        *_FLAGS,
        *defined,
        f"-I{HERE}",
        f"-I{HERE.parent / 'cuda'}",
        f"-I{_TESTS}",
        str(_TESTS / "emulated.cpp"),
    ]
    run = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return loaded


def emulate(
    build: KernelBuild, arguments: LaunchArguments, grid: tuple[int, int], *, seed: int = 1
) -> None:
    """Launch on the emulator: a Launch."""
    turn = int(build.name == "to_feature_major")
    library(build.macros).emulate(turn, ctypes.byref(arguments), *grid, build.threads, seed)
