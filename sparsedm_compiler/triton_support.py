"""Tells whether Triton kernels can run. Importing this module does not import Triton."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor


@cache
def why_unavailable() -> str | None:
    """Returns why no Triton kernel can run here, as a sentence; None where they can.

    Triton builds its launcher with the machine's C compiler on first use, so that is tried too.
    """
    try:
        from triton.runtime import driver
    except ImportError as error:
        return f"Triton cannot be imported ({error}); it comes with torch for CUDA"
    if is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device here to run Triton kernels on"
    try:
        driver.active.get_current_target()
    except Exception as error:  # of any kind: drivers raise their own
        return f"Triton does not run on this machine: {error}"
    return None


def is_interpreted() -> bool:
    """Returns whether Triton interprets its kernels in Python, on any device: its test mode."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Returns a context in which kernels are launched on the CUDA device of ``tensor``, if any."""
    context: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return context
