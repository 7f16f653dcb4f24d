"""Families whose packed bytes hold numbers alone: size, pattern and dtype come with them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...errors import PackError
from ...patterns import Pattern
from ..kernel_family import KernelConfig, KernelFamily, WeightFormat
from ..weight_matrix import from_matrix, matrix


class Format(Protocol):
    """A module that packs matrices and unpacks them."""

    @property
    def TYPES(self) -> Sequence[torch.dtype]:  # noqa: N802
        """Of the values; their place is their code in a Kernel."""
        ...

    def refusal(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        """Why a matrix cannot be packed, None if it can."""

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
        """The packed form of ``weight * mask``."""
        ...

    def unpack(
        self, packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype
    ) -> Tensor:
        """The masked matrix, to the bit."""
        ...

    def check(
        self, packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype
    ) -> None:
        """Raise PackError unless a kernel can run these bytes within their bounds."""


class BareFamily(KernelFamily):
    """The kernels that read one such format. Layout of a Kernel: (place of the dtype in TYPES)."""

    @property
    @abstractmethod
    def format(self) -> Format:
        """The format."""

    def refusal(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        return self.format.refusal(pattern, rows, cols, dtype)

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        return self.format.pack(matrix(weight.detach()), matrix(mask), pattern)

    def unpack(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> Tensor:
        dense = self.format.unpack(packed, *_size(shape), form.pattern, self._dtype(form))
        return from_matrix(dense, shape[2:])

    def check(self, packed: Tensor, shape: tuple[int, ...], form: WeightFormat) -> torch.dtype:
        dtype = self._dtype(form)
        why = self.refusal(form.pattern, *_size(shape), dtype)
        if why is not None:
            raise PackError(f"no weight of {list(shape)} is packed to {form.pattern}: {why}")
        self.format.check(packed, *_size(shape), form.pattern, dtype)
        return dtype

    def _dtype(self, form: WeightFormat) -> torch.dtype:
        assert form.kernel is not None
        (place,) = form.kernel.layout
        return self.format.TYPES[place]


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
