"""The C++ compiler of this machine."""

from __future__ import annotations

import shutil
from functools import cache


@cache
def find_compiler() -> str | None:
    """Returns the C++ compiler that Inductor would use (CXX), None if there is none."""
    from torch._inductor import config

    candidates = config.cpp.cxx
    names = candidates if isinstance(candidates, (tuple, list)) else (candidates,)
    return next((name for name in names if name is not None and shutil.which(name)), None)
