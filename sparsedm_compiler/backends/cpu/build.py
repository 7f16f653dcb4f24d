"""The C++ kernels: built with the user's compiler on first use, kept on disk, loaded by ctypes.

The compiler is the one Inductor finds (CXX). $SPARSEDM_CXXFLAGS is added to its flags, which is how
``make sanitize`` builds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from ...errors import KernelError
from ...fileio import cache_folder
from .abi import KernelArguments

_SOURCES = ("kernel.cpp", "pack.cpp")
_HEADERS = ("act.h", "format.h", "vec.h", "wide.h")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-Wall", "-Wextra")
_ISA_FLAGS = {
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
HERE = Path(__file__).parent / "csrc"


@cache
def library() -> ctypes.CDLL:
    """The kernel library for this CPU. Raises KernelError with the reason where there is none.

    Which instructions it uses follows torch (ATEN_CPU_CAPABILITY). The first call on a machine
    compiles for some seconds.
    """
    try:
        loaded = ctypes.CDLL(str(_built()))
    except OSError as error:
        raise KernelError(f"the CPU kernels do not load: {error}") from error
    loaded.sdm_run.argtypes = [ctypes.POINTER(KernelArguments)]
    loaded.sdm_run.restype = ctypes.c_int32
    loaded.sdm_pack.argtypes = [ctypes.c_void_p] * 3
    loaded.sdm_pack.restype = ctypes.c_int32
    loaded.sdm_isa.restype = ctypes.c_char_p
    return loaded


@cache
def unavailable() -> str | None:
    """Why there are no CPU kernels here, as a sentence; None where there are."""
    try:
        library()
    except KernelError as error:
        return str(error)
    return None


@cache
def version() -> str:
    """A hash of the sources: measurements and builds of other sources do not count."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def _built() -> Path:
    compiler = find_compiler()
    if compiler is None:
        raise KernelError("no C++ compiler here to build CPU kernels with; install g++ or set CXX")
    asked = os.environ.get("SPARSEDM_CXXFLAGS", "").split()
    flags = (*_FLAGS, *_ISA_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()), *asked)
    key = hashlib.sha256(repr((version(), compiler, flags, torch.__version__)).encode())
    target = cache_folder("kernels") / f"nm-{key.hexdigest()[:16]}.so"
    if not target.exists():
        _build(compiler, flags, target)
    return target


def _build(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Compile into a file of our own, then move it into place: other processes see all or none."""
    sources = [str(HERE / name) for name in _SOURCES]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        out = str(Path(scratch, target.name))
        # torch's OpenMP by path and before the compiler's: two thread pools would fight.
        pool = [str(path) for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*")][:1]
        openmp = ("-fopenmp", *sources, "-Wl,--as-needed", *pool)
        for attempt in (openmp, tuple(sources)):  # without OpenMP: one thread
            run = _run([compiler, *flags, *attempt, "-o", out])
            if run.returncode == 0:
                os.replace(out, target)
                return
    said = (run.stderr.strip().splitlines() or ["it said nothing"])[0]
    raise KernelError(f"{compiler} cannot build the CPU kernels: {said}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{command[0]} cannot build the CPU kernels: {error}") from error


@cache
def find_compiler() -> str | None:
    """The C++ compiler that Inductor would use, None if there is none."""
    from torch._inductor import config

    candidates = config.cpp.cxx
    names = candidates if isinstance(candidates, (tuple, list)) else (candidates,)
    return next((name for name in names if name is not None and shutil.which(name)), None)
