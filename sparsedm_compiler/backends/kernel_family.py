"""What a kernel family is: the kernels of one device that read one packed format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..patterns import Pattern

OpCall = tuple[Callable[..., Tensor], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """A sparse kernel in one setting.

    ``name``: as ``explain`` shows it. ``layout``: the numbers of the setting that packing depends
    on. ``tile``: those that it does not.
    """

    name: str
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

    @property
    def untiled(self) -> KernelConfig:
        """What of it decides how a weight is packed."""
        return replace(self, tile=())

    def __str__(self) -> str:
        return "/".join((self.name, *map(str, self.layout), *map(str, self.tile)))


@dataclass(frozen=True, slots=True)
class MatmulProblem:
    """What a kernel has to do for one use of a weight.

    ``inputs``: shape of x (hints where symbolic). ``dtype``: of x as the kernel gets it, and of the
    output. ``kernel``, ``stride``, ``padding``, ``dilation``: of a conv2d, () for linear.
    ``act``: one of ACTS.
    """

    inputs: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    act: str = "none"


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What a graph reads in the place of a weight.

    ``dtype``: None for the weight's own. ``kernel``: the kernel it is packed for, without tile;
    None for the dense masked weight.
    """

    pattern: Pattern
    dtype: torch.dtype | None = None
    kernel: KernelConfig | None = None


class KernelFamily(ABC):
    """The kernels of one device that read one packed format.

    ``inexact``: what its kernels do to numbers beyond the model's dtype, as a phrase; "" for
    nothing. Others run only where pinned by name, and the dense weight stays beside their form.
    ``opaque``: whether the packed form means nothing on another machine, so that files hold what
    ``portable`` gives.
    """

    device: str
    names: tuple[str, ...]
    inexact: str = ""
    opaque: bool = False

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why none of them runs on this machine, as a sentence; None if they do."""

    @abstractmethod
    def refusal(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        """Why a weight of that size cannot be packed, as a sentence; None if it can."""

    @abstractmethod
    def candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        """The kernels for a pattern, in the settings worth measuring."""

    @abstractmethod
    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        """weight * mask packed, on the weight's device; [rows, cols] or [rows, cols, kh, kw]."""

    @abstractmethod
    def unpack(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> Tensor:
        """The masked dense weight of that shape, to the bit."""

    @abstractmethod
    def check(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> torch.dtype:
        """The dtype of a packed weight from a file, as ``portable`` gives it, on the CPU.

        Raises PackError unless it is one of that shape that may be run or unpacked.
        """

    def portable(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> Tensor:
        """The packed weight as files hold it, on the CPU: ``check`` takes it, and ``unpack``."""
        return packed.cpu()

    @abstractmethod
    def call(self, work: MatmulProblem, form: WeightFormat, tile: tuple[int, ...]) -> OpCall:
        """What does the work, and its arguments behind (x, packed weight, bias, rows)."""

    @abstractmethod
    def machine(self) -> tuple[Any, ...]:
        """All that a measured time depends on, but for the weight and its use."""
