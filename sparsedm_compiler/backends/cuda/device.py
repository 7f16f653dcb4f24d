"""Facts about the CUDA device and torch's build for it, and sentences on what they cannot run."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

import torch

from ...optional_deps import read_version

Version = tuple[int, int, int]

SPARSE_CORES = (8, 0)
"""The first compute capability with sparse tensor cores."""
FP8_CORES = (8, 9)
"""The first compute capability with sparse tensor cores for e4m3."""
BETTER_CUSPARSELT = (0, 8, 1)
"""The first version of cuSPARSELt about which no slowness is known."""


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """Facts about one device, and about the torch that drives it.

    Attributes:
        name: The device's name.
        capability: Its compute capability.
        cuda: The CUDA version that torch was built for; None if it was built for ROCm.
        hip: The HIP version that torch was built for; None if it was built for CUDA.
        cusparselt: Version of the cuSPARSELt that is loaded; None without it.
        platform: As ``sys.platform``.
        multiprocessors: Number of multiprocessors.
        shared_bytes: Shared memory that one block may ask for.
        l2_bytes: Size of the L2 cache.
    """

    name: str
    capability: tuple[int, int]
    cuda: str | None = None
    hip: str | None = None
    cusparselt: Version | None = None
    platform: str = "linux"
    multiprocessors: int = 0
    shared_bytes: int = 0
    l2_bytes: int = 0


def find_device(index: int | None = None) -> CudaDevice | None:
    """Returns the facts of a CUDA device (None: the current one); None where none can be used."""
    try:
        if not torch.cuda.is_available():
            return None
        return _read_device(torch.cuda.current_device() if index is None else index)
    except (RuntimeError, AssertionError):  # no driver, a forked process, no such device
        return None


def describe_machine() -> tuple[CudaDevice | None, str]:
    """Returns all of this machine that the time of a kernel on its current device depends on."""
    return find_device(), torch.__version__


def why_no_tensor_cores(device: CudaDevice | None) -> str | None:
    """Returns why no sparse tensor cores can be used, as a sentence; None if they can."""
    return _why_below(device, SPARSE_CORES, "no sparse tensor cores")


def why_no_fp8_cores(device: CudaDevice | None) -> str | None:
    """Returns why no sparse tensor cores for float8 can be used; None if they can."""
    return _why_below(device, FP8_CORES, "no sparse tensor cores for float8")


def why_no_cusparselt(device: CudaDevice | None) -> str | None:
    """Returns why cuSPARSELt cannot be used, as a sentence; None if it can."""
    if device is None:
        return _NO_DEVICE
    if device.cusparselt is None:
        if device.platform == "win32":
            return "no cuSPARSELt: torch's wheels for Windows leave it out"
        return "no cuSPARSELt: this torch was built without it"
    return None


def note_cusparselt(device: CudaDevice | None) -> str | None:
    """Returns what is known against the cuSPARSELt that is loaded, as a phrase; None for nothing.

    It refuses nothing: kernels are measured beside dense, whatever the version.
    """
    if device is None or device.cusparselt is None or device.cusparselt >= BETTER_CUSPARSELT:
        return None
    version, better = _format_version(device.cusparselt), _format_version(BETTER_CUSPARSELT)
    return f"cuSPARSELt {version} is slower on some cards than {better}"


def list_cusparselt() -> dict[str, str | None]:
    """Returns the version of cuSPARSELt by its name; None without the library."""
    version = _read_cusparselt_version()
    return {"cuSPARSELt": None if version is None else _format_version(version)}


def list_triton() -> dict[str, str | None]:
    """Returns the version of Triton by its name; None without it."""
    names = ("triton", "pytorch-triton", "triton-windows")
    return {"Triton": next(filter(None, map(read_version, names)), None)}


def why_no_nvrtc(device: CudaDevice | None) -> str | None:
    """Returns why kernels cannot be compiled by NVRTC, as a sentence; None if they can.

    Unlike cuSPARSELt it comes with torch's wheels for Windows too.
    """
    if device is None:
        return _NO_DEVICE
    return None if device.hip is None else "torch is built for ROCm, which has no NVRTC"


_NO_DEVICE = "no CUDA device can be used"


def _why_below(device: CudaDevice | None, needed: tuple[int, int], lack: str) -> str | None:
    if device is None:
        return _NO_DEVICE
    if device.hip is not None:
        return f"{lack}: torch is built for ROCm, whose cards have no kernel here yet"
    if device.capability < needed:
        return (
            f"{lack}: {device.name} has compute capability {_format_version(device.capability)}, "
            f"{_format_version(needed)} is needed"
        )
    return None


@cache
def _read_device(index: int) -> CudaDevice:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    else:  # torch leaves it out there
        shared = properties.shared_memory_per_block
    return CudaDevice(
        name=properties.name,
        capability=(properties.major, properties.minor),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        cusparselt=_read_cusparselt_version(),
        platform=sys.platform,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=shared,
        l2_bytes=properties.L2_cache_size,
    )


def _read_cusparselt_version() -> Version | None:
    """Returns the version that runs; torch knows only the one whose header it was built with."""
    built = torch.backends.cusparselt.version()
    if built is None:
        return None
    header = (built // 1000, built // 100 % 10, built % 100)
    parts = []
    try:
        library = ctypes.CDLL("libcusparseLt.so.0")  # found as the one torch has loaded
        for index in range(3):
            part = ctypes.c_int()
            if library.cusparseLtGetProperty(index, ctypes.byref(part)):
                return header
            parts.append(part.value)
    except (OSError, AttributeError):
        return header
    return parts[0], parts[1], parts[2]


def _format_version(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
