"""All kernel families, by device and by the names of their kernels."""

from __future__ import annotations

from .cpu.family import CpuFamily
from .family import Family

FAMILIES: tuple[Family, ...] = (CpuFamily(),)


def families_of(device: str) -> tuple[Family, ...]:
    """The families for tensors of a device type ("cpu", "cuda"), in the order to try them."""
    return tuple(family for family in FAMILIES if family.device == device)


def family_of(kernel: str) -> Family:
    """The family of a kernel, by its name."""
    return next(family for family in FAMILIES if kernel in family.names)
