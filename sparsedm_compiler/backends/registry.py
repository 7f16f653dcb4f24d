"""All kernel families, by device and by the names of their kernels."""

from __future__ import annotations

from ..errors import KernelError
from .cpu.family import CpuFamily
from .cusparselt.family import SemiFamily
from .cusparselt.quantized import QuantizedFamily
from .gather.family import GatherFamily
from .kernel_family import Family
from .vnm.family import VnmFamily

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
