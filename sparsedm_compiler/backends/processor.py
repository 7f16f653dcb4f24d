"""The processor of this machine."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def read_cpu_name() -> str:
    """Returns the model of this CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
