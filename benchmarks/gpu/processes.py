"""Processes of our own, and how they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PAUSE = 1.0
_GRACE = 3.0
SILENCE = 90.0
"""Seconds in which a process that works says something: longer than any first call takes."""


class SilentError(Exception):
    """A process said nothing for ``SILENCE``: what it waits for never comes."""


def wait_or_stop(
    process: subprocess.Popen[bytes], until: float, meanwhile: Callable[[], object] | None = None
) -> int | None:
    """The exit code of a process that leads its own session; None if it had to be stopped.

    ``meanwhile`` is called each second; where it raises, the process is stopped, too.
    """
    try:
        while time.time() < until:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_PAUSE)
            if meanwhile is not None:
                meanwhile()
    finally:
        stop(process)
    return None


class Listener:
    """Hears whether a log grows."""

    def __init__(self, log: Path) -> None:
        self._log, self._size, self._heard = log, -1, time.time()

    def check(self) -> None:
        """Raises SilentError where it has not grown for ``SILENCE``."""
        size = self._log.stat().st_size if self._log.exists() else -1
        if size != self._size:
            self._size, self._heard = size, time.time()
        elif time.time() - self._heard > SILENCE:
            raise SilentError(f"no sign of life for {SILENCE:.0f} s")


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
