"""Processes of our own, and how they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

_PAUSE = 1.0
_GRACE = 3.0


def wait_or_stop(
    process: subprocess.Popen[bytes], until: float, meanwhile: Callable[[], object] | None = None
) -> int | None:
    """The exit code of a process that leads its own session; None if it had to be stopped."""
    while time.time() < until:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_PAUSE)
        if meanwhile is not None:
            meanwhile()
    stop(process)
    return None


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what outlived its leader
