"""What the CUDA device and torch's build of it can run: facts, and sentences where they cannot."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

import torch

Version = tuple[int, int, int]

SPARSE_CORES = (8, 0)
"""The first compute capability with sparse tensor cores; FP8_CORES: with those for e4m3."""
FP8_CORES = (8, 9)
GOOD_CUSPARSELT = (0, 8, 1)


@dataclass(frozen=True, slots=True)
class Card:
    """Facts about one device, and about the torch that drives it.

    ``cuda``, ``hip``: what torch was built for, None for the other of the two. ``cusparselt``: the
    library as loaded, None without. ``shared_bytes``: shared memory one block may ask for.
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


def card(index: int | None = None) -> Card | None:
    """The facts of a CUDA device (None: of the current one); None where none can be used."""
    try:
        if not torch.cuda.is_available():
            return None
        return _card(torch.cuda.current_device() if index is None else index)
    except (RuntimeError, AssertionError):  # no driver, a forked process, no such device
        return None


def machine() -> tuple[Card | None, str]:
    """All of this machine that the time of a kernel on its current card depends on."""
    return card(), torch.__version__


def no_tensor_cores(card: Card | None) -> str | None:
    """Why no sparse tensor cores can be used, as a sentence; None if they can."""
    return _below(card, SPARSE_CORES, "no sparse tensor cores")


def no_fp8_cores(card: Card | None) -> str | None:
    """Why no sparse tensor cores for float8 can be used, as a sentence; None if they can."""
    return _below(card, FP8_CORES, "no sparse tensor cores for float8")


def no_cusparselt(card: Card | None) -> str | None:
    """Why cuSPARSELt cannot be used, as a sentence; None if it can."""
    if card is None:
        return _NO_DEVICE
    if card.cusparselt is None:
        if card.platform == "win32":
            return "no cuSPARSELt: torch's wheels for Windows leave it out"
        return "no cuSPARSELt: this torch was built without it"
    if card.cusparselt < GOOD_CUSPARSELT:
        return (
            f"cuSPARSELt {_dotted(card.cusparselt)} is too old: {_dotted(GOOD_CUSPARSELT)} mends "
            "0.8.0, which is slower than dense on H100; pip install -U nvidia-cusparselt-cu13"
        )
    return None


def no_nvrtc(card: Card | None) -> str | None:
    """Why kernels cannot be compiled by NVRTC, as a sentence; None if they can.

    Unlike cuSPARSELt it comes with torch's wheels for Windows too.
    """
    if card is None:
        return _NO_DEVICE
    return None if card.hip is None else "torch is built for ROCm, which has no NVRTC"


_NO_DEVICE = "no CUDA device can be used"


def _below(card: Card | None, needed: tuple[int, int], what: str) -> str | None:
    if card is None:
        return _NO_DEVICE
    if card.hip is not None:
        return f"{what}: torch is built for ROCm, whose cards have no kernel here yet"
    if card.capability < needed:
        return (
            f"{what}: {card.name} has compute capability {_dotted(card.capability)}, "
            f"{_dotted(needed)} is needed"
        )
    return None


@cache
def _card(index: int) -> Card:
    seen = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        shared = seen.shared_memory_per_block_optin  # type: ignore[attr-defined]
    else:  # torch leaves it out there
        shared = seen.shared_memory_per_block
    return Card(
        name=seen.name,
        capability=(seen.major, seen.minor),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        cusparselt=_cusparselt(),
        platform=sys.platform,
        multiprocessors=seen.multi_processor_count,
        shared_bytes=shared,
        l2_bytes=seen.L2_cache_size,
    )


def _cusparselt() -> Version | None:
    """The version that runs; torch itself knows only the one whose header it was built with."""
    built = torch.backends.cusparselt.version()
    if built is None:
        return None
    header = (built // 1000, built // 100 % 10, built % 100)
    parts = []
    try:
        library = ctypes.CDLL("libcusparseLt.so.0")  # found as the one torch has loaded
        for place in range(3):
            part = ctypes.c_int()
            if library.cusparseLtGetProperty(place, ctypes.byref(part)):
                return header
            parts.append(part.value)
    except (OSError, AttributeError):
        return header
    return parts[0], parts[1], parts[2]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
