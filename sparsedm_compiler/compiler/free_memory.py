"""Memory that the C library keeps for later, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

WORTH = 1 << 20
"""Bytes of a weight from which on giving back what its packing took is worth a millisecond."""


def release_after_packing(weight: torch.Tensor) -> None:
    """Gives back what the packing of a weight took, if that was much and on the host.

    A packed weight comes to lie in the middle of the memory that its packing took and freed, so
    that the next, a little larger, finds no room there: without this a model of many weights
    needs several times its size in its first call.
    """
    if weight.device.type == "cpu" and weight.nbytes >= WORTH:
        trim = _find_trim()
        if trim is not None:
            trim(0)


@cache
def _find_trim() -> Callable[[int], int] | None:
    """Returns glibc's ``malloc_trim``; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS and musl, Windows
        return None
