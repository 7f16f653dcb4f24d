"""All kernel families, by device and by the names of their kernels."""

from __future__ import annotations

from ..errors import KernelError
from .cpu.family import CpuFamily
from .cusparselt.family import SemiFamily
from .cusparselt.quantized import QuantizedFamily
from .gather.family import GatherFamily
from .kernel_family import KernelFamily
from .vnm.family import VnmFamily

FAMILIES: tuple[KernelFamily, ...] = (
    CpuFamily(),
    VnmFamily(),
    GatherFamily(),
    SemiFamily(),
    QuantizedFamily("fp8"),
    QuantizedFamily("int8"),
)
"""In the order to try them: those for fewer patterns, which gain more, first."""


def find_families(device: str) -> tuple[KernelFamily, ...]:
    """The families for tensors of a device type ("cpu", "cuda")."""
    return tuple(family for family in FAMILIES if family.device == device)


def find_family(kernel: str) -> KernelFamily:
    """The family of a kernel, by its name. Raises KernelError for a name that is none's."""
    for family in FAMILIES:
        if kernel in family.names:
            return family
    raise KernelError(f"no kernel is called {kernel!r}")
