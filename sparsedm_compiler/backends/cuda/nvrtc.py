"""Compiles CUDA C++ by NVRTC and launches it by the driver: users need no nvcc.

Compiling needs no GPU, only NVRTC, which every CUDA build of torch brings along; a compiled kernel
is kept on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ...errors import KernelError
from ...fileio import cache_folder, write_atomically

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PLAIN_SHARED = 48 * 1024
_MAY_OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: a number, and a union of 64 bytes that holds an int here."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


_OVERLAP = _LaunchAttribute(_MAY_OVERLAP, 0, (1,))


@cache
def load_nvrtc() -> ctypes.CDLL:
    """Returns the NVRTC library: the one that torch has loaded, or one among Python's packages.

    Raises KernelError where there is none.
    """
    major = (torch.version.cuda or "13").partition(".")[0]
    windows = sys.platform == "win32"
    name = f"nvrtc64_{major}0_0.dll" if windows else f"libnvrtc.so.{major}"
    for builtins in _find_libraries("nvrtc-builtins*.dll" if windows else "libnvrtc-builtins.so.*"):
        with suppress(OSError):  # NVRTC asks for it by name alone, and not every build finds it
            ctypes.CDLL(builtins)
    for path in (name, *_find_libraries(name)):
        with suppress(OSError):
            return ctypes.CDLL(path)
    raise KernelError(
        f"no NVRTC here to build CUDA kernels with ({name}); pip install nvidia-cuda-nvrtc"
    )


def _find_libraries(pattern: str) -> list[str]:
    """Returns the libraries of such a name among those of torch and of NVIDIA's packages."""
    paths = list((Path(torch.__file__).parent / "lib").glob(pattern))
    for root in sys.path:
        for folder_name in ("lib", "bin", "bin/x86_64"):
            paths += Path(root, "nvidia").glob(f"*/{folder_name}/{pattern}")
    return [str(path) for path in paths]


@cache
def read_shared_source() -> str:
    """Returns what the kernels of all families share, as CUDA C++ that names no header."""
    folder = Path(__file__).parent
    return "".join((folder / name).read_text() for name in ("rounding.cuh", "activated.cuh"))


@cache
def read_nvrtc_version() -> int:
    """Returns CUDA_VERSION_NUMBER of the kernels: 13000 is 13.0."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    load_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return 1000 * major.value + 10 * minor.value


@cache
def why_unavailable() -> str | None:
    """Returns why kernels cannot be built here, as a sentence; None where they can."""
    try:
        load_nvrtc()
    except KernelError as error:
        return str(error)
    return None


def list_nvrtc() -> dict[str, str | None]:
    """Returns the version of NVRTC by its name; None without the library."""
    if why_unavailable() is not None:
        return {"NVRTC": None}
    version = read_nvrtc_version()
    return {"NVRTC": f"{version // 1000}.{version % 1000 // 10}"}


def compile_kernel(
    source: str,
    capability: tuple[int, int],
    macros: Sequence[tuple[str, int]],
    *,
    feature: str = "",
) -> bytes:
    """Returns the machine code (a cubin) of a source for one kind of device.

    It comes from disk if it was built before.

    Args:
        source: CUDA C++.
        capability: The device's compute capability.
        macros: Macros with their values.
        feature: "a" for the instructions that only this architecture has.

    Raises:
        KernelError: It does not compile; with the compiler's words.
    """
    defined = (*macros, ("CUDA_VERSION_NUMBER", read_nvrtc_version()))
    options = (
        "--std=c++17",
        f"--gpu-architecture={_find_architecture(capability)}{feature}",
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


def _find_architecture(capability: tuple[int, int]) -> str:
    """Returns the newest architecture that this NVRTC knows and the device runs."""
    number = ctypes.c_int()
    load_nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(number))
    known = (ctypes.c_int * number.value)()
    load_nvrtc().nvrtcGetSupportedArchs(known)
    major, minor = capability
    fitting = [arch for arch in known if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        version = read_nvrtc_version()
        raise KernelError(
            f"NVRTC {version // 1000}.{version % 1000 // 10} does not know compute "
            f"capability {major}.{minor}; install a torch built for a newer CUDA"
        )
    return f"sm_{max(fitting)}"


def _compile(source: str, options: Sequence[str]) -> bytes:
    library, program = load_nvrtc(), ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
        )
    )
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), arguments) != 0:
            said = _read_text(program, "ProgramLog").decode(errors="replace").rstrip("\0")
            raise KernelError(f"a CUDA kernel does not compile: {said}")
        return _read_text(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read_text(program: ctypes.c_void_p, kind: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(load_nvrtc(), f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(load_nvrtc(), f"nvrtcGet{kind}")(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code != 0:
        said = load_nvrtc().nvrtcGetErrorString
        said.restype = ctypes.c_char_p
        raise KernelError(f"NVRTC: {said(code).decode()}")


class Launcher:
    """A kernel on one device, launched on torch's current stream (a CUDA graph's too)."""

    def __init__(
        self, code: bytes, name: str, shared: int, device: int, *, overlaps: bool = False
    ) -> None:
        """Loads a cubin on a device.

        Args:
            code: The cubin.
            name: The kernel's name in it.
            shared: Bytes of dynamic shared memory.
            device: The number of the device.
            overlaps: Whether the kernel may begin while the one before it still runs. It must then
                wait for that one (``griddepcontrol.wait``, from compute capability 9.0 on).
        """
        self.shared = shared
        self._attributes = (_LaunchAttribute * 1)(_OVERLAP) if overlaps else None
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            bind_context(device)
            call_driver("cuModuleLoadData", ctypes.byref(self._module), code)
            call_driver(
                "cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode()
            )
            if shared > _PLAIN_SHARED:
                call_driver("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, shared)

    def __call__(self, arguments: ctypes.Structure, grid: tuple[int, int], threads: int) -> None:
        """Launches with one structure as the only argument."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if self._attributes is None:
            sizes = (*grid, 1, threads, 1, 1)
            call_driver(
                "cuLaunchKernel", self._function, *sizes, self.shared, stream, pointers, None
            )
            return
        config = _LaunchConfig(
            (*grid, 1),
            (threads, 1, 1),
            self.shared,
            stream,
            self._attributes,
            len(self._attributes),
        )
        call_driver("cuLaunchKernelEx", ctypes.byref(config), self._function, pointers, None)


@cache
def _load_driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise KernelError(f"no CUDA driver: {error}") from error


_thread = threading.local()


def bind_context(device: int) -> None:
    """Gives this thread the context of a device, which is torch's current one, if it has none yet.

    Functions of the driver need one, unlike those of the runtime, which make it. In a thread that
    has not touched a device (autograd's in a first backward) ``torch.cuda.device(0)`` makes none.
    """
    if getattr(_thread, "has_context", False):
        return
    context, handle = ctypes.c_void_p(), ctypes.c_int()
    call_driver("cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        call_driver("cuDeviceGet", ctypes.byref(handle), device)
        call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        call_driver("cuCtxSetCurrent", context)
    _thread.has_context = True


def call_driver(call: str, *arguments: object) -> None:
    """Calls a function of the CUDA driver. Raises KernelError with the name of an error."""
    code = getattr(_load_driver(), call)(*arguments)
    if code != 0:
        name = ctypes.c_char_p()
        _load_driver().cuGetErrorName(code, ctypes.byref(name))
        raise KernelError(f"{call}: {(name.value or b'CUDA error').decode()} ({code})")
