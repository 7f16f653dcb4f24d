"""Builds the C++ kernels with the user's compiler on first use, keeps and loads them.

The compiler is the one Inductor finds (CXX). $SPARSEDM_CXXFLAGS is added to its flags, which is how
``make sanitize`` builds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from ...errors import KernelError
from ...fileio import cache_folder, replace_atomically
from ...progress import announce
from ..cpp_compiler import find_compiler
from .abi import KernelArguments

_SOURCES = ("kernel.cpp", "pack.cpp")
_HEADERS = (
    *("act.h", "blocks.h", "format.h", "multiply.h", "norm.h", "pieces.h", "tiles.h", "vec.h"),
    "wide.h",
)
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-Wall", "-Wextra")
_ISA_FLAGS = {
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
_MACHINE_FLAGS = {"aarch64": ("-fno-schedule-insns",)}  # it would load more than registers hold
HERE = Path(__file__).parent / "csrc"


@cache
def load_library() -> ctypes.CDLL:
    """Returns the kernel library for this CPU. Raises KernelError with the reason without one.

    Which instructions it uses follows torch (ATEN_CPU_CAPABILITY). The first call on a machine
    compiles for some seconds.
    """
    try:
        loaded = ctypes.CDLL(str(_find_or_build()))
    except OSError as error:
        raise KernelError(f"the CPU kernels do not load: {error}") from error
    loaded.sdm_run.argtypes = [ctypes.POINTER(KernelArguments)]
    loaded.sdm_run.restype = ctypes.c_int32
    loaded.sdm_time.argtypes = [
        ctypes.POINTER(KernelArguments),
        *[ctypes.c_void_p] * 2,
        ctypes.c_int64,
    ]
    loaded.sdm_time.restype = ctypes.c_int64
    loaded.sdm_pack.argtypes = [ctypes.c_void_p] * 3
    loaded.sdm_pack.restype = ctypes.c_int32
    loaded.sdm_isa.restype = ctypes.c_char_p
    return loaded


@cache
def why_unavailable() -> str | None:
    """Returns why there are no CPU kernels here, as a sentence; None where there are."""
    try:
        load_library()
    except KernelError as error:
        return str(error)
    return None


@cache
def hash_sources() -> str:
    """Returns a hash of the sources: measurements and builds of other sources do not count."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def list_flags(machine: str, capability: str) -> tuple[str, ...]:
    """Returns the compiler's flags for a machine, as ``platform`` names it, with those vectors."""
    return (*_FLAGS, *_MACHINE_FLAGS.get(machine, ()), *_ISA_FLAGS.get(capability, ()))


def _find_or_build() -> Path:
    compiler = find_compiler()
    if compiler is None:
        raise KernelError("no C++ compiler here to build CPU kernels with; install g++ or set CXX")
    user_flags = os.environ.get("SPARSEDM_CXXFLAGS", "").split()
    capability = torch.backends.cpu.get_cpu_capability()
    flags = (*list_flags(platform.machine(), capability), *user_flags)
    key = hashlib.sha256(repr((hash_sources(), compiler, flags, torch.__version__)).encode())
    target = cache_folder("kernels") / f"nm-{key.hexdigest()[:16]}.so"
    if not target.exists():
        _build(compiler, flags, target)
    return target


def _build(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    sources = [str(HERE / name) for name in _SOURCES]
    # torch's OpenMP by path and before the compiler's: two thread pools would fight.
    pool = [str(path) for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*")][:1]
    openmp = ("-fopenmp", *sources, "-Wl,--as-needed", *pool)
    with replace_atomically(target, shared=True) as out:
        for attempt in (openmp, tuple(sources)):  # without OpenMP: one thread
            with announce("building the CPU kernels", "kept on disk"):
                run = _run([compiler, *flags, *attempt, "-o", str(out)])
            if run.returncode == 0:
                return
        output = (run.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise KernelError(f"{compiler} cannot build the CPU kernels: {output}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{command[0]} cannot build the CPU kernels: {error}") from error
