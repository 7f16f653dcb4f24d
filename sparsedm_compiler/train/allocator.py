"""Memory of training on a CPU: what one step frees serves the next."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# As glibc's malloc.h names and numbers them; mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_LARGEST_TRIM_THRESHOLD = 2**31 - 1


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Has glibc keep freed memory for the block, which it otherwise hands back to the system.

    A training step frees all that it took: the gradients, and the masked copy of every weight.
    Taken anew in the next step, each page of it costs a page fault. The peak stays what it is.
    Afterwards free memory is given back. Without glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)  # where its own rule ends up
        libc.malloc_trim(0)
