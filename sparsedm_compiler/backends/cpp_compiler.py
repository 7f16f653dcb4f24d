"""The C++ compiler of this machine."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path


@cache
def find_compiler() -> str | None:
    """Returns the C++ compiler that Inductor would use (CXX), None if there is none."""
    from torch._inductor import config

    candidates = config.cpp.cxx
    names = candidates if isinstance(candidates, (tuple, list)) else (candidates,)
    return next((name for name in names if name is not None and shutil.which(name)), None)


def describe_compiler() -> str | None:
    """Returns the name of the C++ compiler and the first line of its version; None without one."""
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        run = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler}, which does not start: {error}"
    lines = run.stdout.strip().splitlines() if run.returncode == 0 else []
    if not lines:
        return f"{compiler}, of unknown version"
    return lines[0] if Path(compiler).name in lines[0] else f"{compiler}: {lines[0]}"
