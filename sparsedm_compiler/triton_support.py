"""Where Triton kernels can run. Nothing here imports Triton before it is asked for."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor


@cache
def unavailable() -> str | None:
    """Why no Triton kernel can run here, as a sentence; None where they can.

    Triton builds its launcher with the machine's C compiler on first use, so that is tried, too.
    """
    try:
        from triton.runtime import driver
    except ImportError as error:
        return f"Triton cannot be imported ({error}); it comes with torch for CUDA"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device here to run Triton kernels on"
    try:
        driver.active.get_current_target()
    except Exception as error:  # whatever stands in its way, there is another one than Triton's
        return f"Triton does not run on this machine: {error}"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of any device: its own test mode."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Where kernels are launched meanwhile: the device of ``tensor``, if it is a CUDA one."""
    found: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return found
