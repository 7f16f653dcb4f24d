"""All kernel families, by device and by the names of their kernels."""

from __future__ import annotations

from ..errors import KernelError
from .cpu.family import CpuFamily
from .cuda.gather_family import GatherFamily
from .cuda.quantized import QuantizedFamily
from .cuda.semi import SemiFamily
from .cuda.vnm_family import VnmFamily
from .family import Family

FAMILIES: tuple[Family, ...] = (
    CpuFamily(),
    VnmFamily(),
    GatherFamily(),
    SemiFamily(),
    QuantizedFamily("fp8"),
    QuantizedFamily("int8"),
)
"""In the order to try them: those for fewer patterns, which gain more, first."""


def families_of(device: str) -> tuple[Family, ...]:
    """The families for tensors of a device type ("cpu", "cuda")."""
    return tuple(family for family in FAMILIES if family.device == device)


def family_of(kernel: str) -> Family:
    """The family of a kernel, by its name. Raises KernelError for a name that is none's."""
    for family in FAMILIES:
        if kernel in family.names:
            return family
    raise KernelError(f"no kernel is called {kernel!r}")
