"""The base of families whose packed buffer has no header: shape, pattern and dtype come apart."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...errors import PackError
from ...patterns import Pattern
from ..kernel_family import KernelConfig, WeightFormat
from ..weight_matrix import from_matrix, to_matrix
from .family import CudaFamily


class RawFormat(Protocol):
    """A module that packs matrices into numbers alone, and unpacks them."""

    @property
    def TYPES(self) -> Sequence[torch.dtype]:  # noqa: N802
        """The dtypes of the values; their index is their code in a KernelConfig."""
        ...

    def why_refused(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        """Returns why a matrix cannot be packed, as a sentence; None if it can."""

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
        """Returns the packed form of ``weight * mask``."""
        ...

    def unpack(
        self, packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype
    ) -> Tensor:
        """Returns the masked matrix, to the bit."""
        ...

    def check(
        self, packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype
    ) -> None:
        """Raises PackError unless a kernel can run these bytes within their bounds."""


class RawFormatFamily(CudaFamily):
    """The kernels that read one such format.

    Layout of a KernelConfig: (index of the dtype in TYPES).
    """

    @property
    @abstractmethod
    def format(self) -> RawFormat:
        """The format that its kernels read."""

    def _refuse(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        return self.format.why_refused(self.require_accepted(pattern), rows, cols, dtype)

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        accepted = self.require_accepted(pattern)
        return self.format.pack(to_matrix(weight.detach()), to_matrix(mask), accepted)

    def unpack(self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat) -> Tensor:
        accepted, dtype = (
            self.require_accepted(weight_format.pattern),
            self._find_dtype(weight_format),
        )
        dense = self.format.unpack(packed, *_find_size(shape), accepted, dtype)
        return from_matrix(dense, shape[2:])

    def check(
        self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat
    ) -> torch.dtype:
        dtype, size = self._find_dtype(weight_format), _find_size(shape)
        reason = self.why_refused(weight_format.pattern, *size, dtype)
        if reason is not None:
            raise PackError(
                f"no weight of {list(shape)} is packed to {weight_format.pattern}: {reason}"
            )
        self.format.check(packed, *size, self.require_accepted(weight_format.pattern), dtype)
        return dtype

    def _find_dtype(self, weight_format: WeightFormat) -> torch.dtype:
        assert weight_format.kernel is not None
        (code,) = weight_format.kernel.layout
        return self.format.TYPES[code]


def _find_size(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
