"""What numbers need beside them to mean something: card, driver, clocks, versions, commit."""

from __future__ import annotations

import platform
import subprocess
import time
from typing import Any

from .case import ROOT
from .packages import losses

ASKED = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
)


def environment(arguments: list[str], commit: str | None) -> dict[str, Any]:
    """As it is now, before anything has run."""
    import torch

    from sparsedm_compiler.autotune.side_by_side import describe_machine

    facts = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "commit": commit or describe_commit() or "unknown",
        "arguments": arguments,
        **describe_machine(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cusparselt": torch.backends.cusparselt.version(),
        "triton": triton(),
        "card": card(),
        "absent": losses(),
    }
    if torch.cuda.is_available():
        seen = torch.cuda.get_device_properties(0)
        facts["capability"] = f"{seen.major}.{seen.minor}"
        facts["multiprocessors"] = seen.multi_processor_count
        facts["l2_bytes"] = seen.L2_cache_size
    return facts


def card() -> dict[str, str] | None:
    """What nvidia-smi says of the first card now; None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = said.stdout.splitlines()[0].split(", ")
    return dict(zip(ASKED, values, strict=False))


def triton() -> str | None:
    """The version of Triton."""
    try:
        import triton as module
    except ImportError:
        return None
    version: str = module.__version__
    return version


def describe_commit() -> str | None:
    """The commit of this copy, where it is a clone; "-dirty" if it was changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return said.stdout.strip() or None
