"""The values that pass between kernel families, kernel selection and the passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..patterns import Pattern

Op = Callable[..., Tensor]
"""An op in the form that an FX graph calls: a custom op's overload, or a plain function."""

OpCall = tuple[Op, dict[str, Any]]
"""An op, and its keyword arguments: it is called as ``op(x, packed, bias, rows, **arguments)``."""


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """A sparse kernel in one setting.

    Attributes:
        name: The kernel's name, as ``explain`` shows it.
        layout: The numbers of the setting that packing depends on.
        tile: The numbers of the setting that packing does not depend on.
    """

    name: str
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

    @property
    def untiled(self) -> KernelConfig:
        """The part that decides how a weight is packed: the same without ``tile``."""
        return replace(self, tile=())

    def __str__(self) -> str:
        return "/".join((self.name, *map(str, self.layout), *map(str, self.tile)))


@dataclass(frozen=True, slots=True)
class MatmulProblem:
    """One product by a weight, as a kernel has to compute it.

    Attributes:
        inputs: Shape of x; hints where a size is symbolic.
        dtype: Dtype of x as the kernel gets it, and of the output.
        channels_last: Whether x lies channels_last in memory.
        kernel: Kernel size of a conv2d; () for linear, as the three below.
        stride: Stride of a conv2d.
        padding: Padding of a conv2d.
        dilation: Dilation of a conv2d.
        act: The activation behind the product, one of ``custom_op.ACTS``.
    """

    inputs: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    act: str = "none"

    def choose_op(self, linear: Op, conv2d: Op, **arguments: Any) -> OpCall:
        """Returns ``linear``, or ``conv2d`` with its geometry, and the keyword arguments."""
        if not self.kernel:
            return linear, arguments
        geometry = {
            "kernel": list(self.kernel),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
        }
        return conv2d, {**geometry, **arguments}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The form in which a graph reads a weight.

    Attributes:
        pattern: The pattern of its mask.
        dtype: Dtype of the values; None for the weight's own.
        kernel: The kernel it is packed for, without tile; None for the dense masked weight.
    """

    pattern: Pattern
    dtype: torch.dtype | None = None
    kernel: KernelConfig | None = None
