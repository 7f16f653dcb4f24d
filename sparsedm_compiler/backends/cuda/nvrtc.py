"""CUDA C++ -> a kernel to launch, by NVRTC and the driver: users need no nvcc.

Compiling needs no GPU, only NVRTC, which every CUDA build of torch brings along; a compiled kernel
is kept on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ...errors import KernelError
from ...fileio import cache_folder, write_atomically

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PLAIN_SHARED = 48 * 1024


@cache
def nvrtc() -> ctypes.CDLL:
    """The NVRTC library: the one that torch has loaded, or one among Python's packages.

    Raises KernelError where there is none.
    """
    major = (torch.version.cuda or "13").partition(".")[0]
    windows = sys.platform == "win32"
    name = f"nvrtc64_{major}0_0.dll" if windows else f"libnvrtc.so.{major}"
    for builtins in _files("nvrtc-builtins*.dll" if windows else "libnvrtc-builtins.so.*"):
        with suppress(OSError):  # NVRTC asks for it by name alone, and not every build finds it
            ctypes.CDLL(builtins)
    for found in (name, *_files(name)):
        with suppress(OSError):
            return ctypes.CDLL(found)
    raise KernelError(
        f"no NVRTC here to build CUDA kernels with ({name}); pip install nvidia-cuda-nvrtc"
    )


def _files(pattern: str) -> list[str]:
    """The libraries of such a name that torch and NVIDIA's Python packages brought along."""
    found = list((Path(torch.__file__).parent / "lib").glob(pattern))
    for place in sys.path:
        for folder_name in ("lib", "bin", "bin/x86_64"):
            found += Path(place, "nvidia").glob(f"*/{folder_name}/{pattern}")
    return [str(path) for path in found]


@cache
def nvrtc_version() -> int:
    """As CUDA_VERSION_NUMBER in the kernels: 13000 is 13.0."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return 1000 * major.value + 10 * minor.value


@cache
def unavailable() -> str | None:
    """Why kernels cannot be built here, as a sentence; None where they can."""
    try:
        nvrtc()
    except KernelError as error:
        return str(error)
    return None


def compiled(source: str, capability: tuple[int, int], macros: Sequence[tuple[str, int]]) -> bytes:
    """The machine code (a cubin) of a source for one kind of card, from disk if built before.

    Raises KernelError with the compiler's words where it does not compile.
    """
    defined = (*macros, ("CUDA_VERSION_NUMBER", nvrtc_version()))
    options = (
        "--std=c++17",
        f"--gpu-architecture={_architecture(capability)}",
        *(f"-D{name}={value}" for name, value in defined),
    )
    key = hashlib.sha256(repr((source, options)).encode()).hexdigest()[:24]
    path = cache_folder("cuda") / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = _compile(source, options)
    write_atomically(path, code)
    return code


def _architecture(capability: tuple[int, int]) -> str:
    """Machine code of the newest kind that this NVRTC knows and the card runs."""
    number = ctypes.c_int()
    nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(number))
    known = (ctypes.c_int * number.value)()
    nvrtc().nvrtcGetSupportedArchs(known)
    major, minor = capability
    fitting = [arch for arch in known if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        raise KernelError(
            f"NVRTC {nvrtc_version() // 1000}.{nvrtc_version() % 1000 // 10} does not know compute "
            f"capability {major}.{minor}; install a torch built for a newer CUDA"
        )
    return f"sm_{max(fitting)}"


def _compile(source: str, options: Sequence[str]) -> bytes:
    library, program = nvrtc(), ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
        )
    )
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given) != 0:
            said = _text(program, "ProgramLog").decode(errors="replace").rstrip("\0")
            raise KernelError(f"a CUDA kernel does not compile: {said}")
        return _text(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code != 0:
        said = nvrtc().nvrtcGetErrorString
        said.restype = ctypes.c_char_p
        raise KernelError(f"NVRTC: {said(code).decode()}")


class Launcher:
    """A kernel on one device, to be launched on torch's current stream (a CUDA graph's too)."""

    def __init__(self, code: bytes, name: str, shared: int, device: int) -> None:
        """``shared``: bytes of dynamic shared memory."""
        self.shared = shared
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            _drive("cuModuleLoadData", ctypes.byref(self._module), code)
            _drive("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
            if shared > _PLAIN_SHARED:
                _drive("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, shared)

    def __call__(self, arguments: ctypes.Structure, grid: tuple[int, int], threads: int) -> None:
        """Launch with one structure as the only argument."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = (*grid, 1, threads, 1, 1)
        _drive("cuLaunchKernel", self._function, *sizes, self.shared, stream, pointers, None)


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise KernelError(f"no CUDA driver: {error}") from error


def _drive(call: str, *arguments: object) -> None:
    code = getattr(_driver(), call)(*arguments)
    if code != 0:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        raise KernelError(f"{call}: {(name.value or b'CUDA error').decode()} ({code})")
