"""All kernel families: by device, by the names of their kernels, and by the ops they declare."""

from __future__ import annotations

from ..config import register_kernel_names, unregister_kernel_names
from ..errors import KernelError
from .cpu.family import CpuFamily
from .cusparselt.family import CuSparseLtFamily
from .cusparselt.quantized import QuantizedFamily
from .fp8.family import Fp8Family
from .gather.family import GatherFamily
from .kernel_family import KernelFamily, Op
from .row_rounding import RowRounding
from .vnm.family import VnmFamily
from .wgmma.family import BlockFamily, SemiFamily

_families: list[KernelFamily] = []


def register_family(family: KernelFamily) -> KernelFamily:
    """Makes the kernels of a family known to ``compile``, after those registered before.

    Args:
        family: An instance of a concrete subclass of ``KernelFamily``.

    Returns:
        The same family.

    Raises:
        ConfigError: A kernel of that name is registered already.
    """
    register_kernel_names(family.names)
    _families.append(family)
    return family


def unregister_family(family: KernelFamily) -> None:
    """Makes ``compile`` forget the kernels of a family."""
    _families.remove(family)
    unregister_kernel_names(family.names)


def list_families() -> tuple[KernelFamily, ...]:
    """Returns all families in the order to try them."""
    return tuple(_families)


def find_families(device: str) -> tuple[KernelFamily, ...]:
    """Returns the families for tensors of a device type ("cpu", "cuda")."""
    return tuple(family for family in _families if family.device == device)


def find_family(kernel: str) -> KernelFamily:
    """Returns the family of a kernel, by its name. Raises KernelError for an unknown name."""
    for family in _families:
        if kernel in family.names:
            return family
    raise KernelError(f"no kernel is called {kernel!r}")


def find_training_families() -> tuple[KernelFamily, ...]:
    """Returns the families that have an op of sparse products in training."""
    return tuple(family for family in _families if family.training_op is not None)


def find_token_multiples() -> dict[Op, int]:
    """Returns the ops that want a multiple of tokens, with that multiple."""
    return {op: family.token_multiple for family in _families for op in family.token_ops}


def find_rounding_ops() -> dict[Op, RowRounding]:
    """Returns the linear ops that round the rows of x to 8 bits, with what they consist of."""
    return {op: parts for family in _families for op, parts in family.rounding_ops.items()}


def find_norm_ops() -> dict[Op, Op]:
    """Returns the conv ops that can compute a norm in front of them, by the op that does."""
    return {op: fused for family in _families for op, fused in family.norm_ops.items()}


def find_feature_major_ops() -> frozenset[Op]:
    """Returns the ops that read and write feature-major activations."""
    ops = (family.feature_major_op for family in _families)
    return frozenset(op for op in ops if op is not None)


# Those for fewer patterns, which gain more, come first.
for _family in (
    CpuFamily(),
    VnmFamily(),
    BlockFamily(),
    GatherFamily(),
    CuSparseLtFamily(),
    SemiFamily(),
    QuantizedFamily("fp8"),
    QuantizedFamily("int8"),
    Fp8Family(),
):
    register_family(_family)
