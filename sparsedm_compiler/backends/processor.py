"""The processor of this machine."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

_NUMBERS = ("cpu family", "model", "CPU implementer", "CPU part")


@cache
def read_cpu_name() -> str:
    """Returns the name of this CPU with its numbers, since hosts call several kinds by one name."""
    try:
        facts = _parse(Path("/proc/cpuinfo").read_text())
    except OSError:
        facts = {}
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in _NUMBERS if key in facts]
    return ", ".join((name, *numbers))


def lacks_bfloat16() -> bool:
    """Returns whether this is an x86 CPU without instructions that multiply bfloat16."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _parse(text: str) -> dict[str, str]:
    """Returns the facts of the first processor of Linux's cpuinfo."""
    lines = text.partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
