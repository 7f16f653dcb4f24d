"""``PackedWeight`` and ``fold_weight``: a pruned weight in the form that a kernel reads."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..masks.nm_mask import apply_mask, nm_mask
from .kernel_family import KernelConfig, KernelFamily, WeightFormat
from .registry import find_families, find_family


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight of which only the packed form is left.

    Attributes:
        weight_format: What ``data`` holds.
        kernel: What runs it.
        shape: The shape of the weight.
        dtype: The dtype of the weight.
        data: The packed bytes, on the weight's device.
    """

    weight_format: WeightFormat
    kernel: KernelConfig
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Tensor

    @property
    def family(self) -> KernelFamily:
        """The family of its kernel."""
        return find_family(self.kernel.name)

    def unpack(self) -> Tensor:
        """Returns the masked dense weight, to the bit."""
        return self.family.unpack(self.data, self.shape, self.weight_format)

    def to_portable(self) -> PackedWeight:
        """Returns the same as files hold it: on the CPU, readable by any machine."""
        return replace(
            self, data=self.family.to_portable(self.data, self.shape, self.weight_format)
        )

    def suits(self, weight: Tensor) -> bool:
        """Returns whether it can run in the place of its parameter as that is now."""
        if weight.device != self.data.device:
            return False
        if self.family not in find_families(weight.device.type):
            return False
        size = self.shape[0], math.prod(self.shape[1:])
        return self.family.why_refused(self.weight_format.pattern, *size, weight.dtype) is None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return replace(self, data=self.data.clone())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the data as bytes, which no ``map_location`` moves to a device."""
        buffer = io.BytesIO()
        torch.save(self.to_portable().data, buffer)
        return _unpickle, (
            self.weight_format,
            self.kernel,
            self.shape,
            self.dtype,
            buffer.getvalue(),
        )


def _unpickle(
    weight_format: WeightFormat,
    kernel: KernelConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    content: bytes,
) -> PackedWeight:
    data = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return PackedWeight(weight_format, kernel, shape, dtype, data)


def fold_weight(weight: Tensor, weight_format: WeightFormat, name: str) -> Tensor:
    """Returns the masked weight, dense or packed. Raises MaskError for NaN and Inf."""
    mask = nm_mask(weight, weight_format.pattern, name=name)
    masked = apply_mask(weight, mask)
    if weight_format.dtype is not None:
        masked = masked.to(weight_format.dtype)
    if weight_format.kernel is None:
        return masked
    return find_family(weight_format.kernel.name).pack(
        masked, mask, weight_format.pattern, weight_format.kernel
    )


def cast_packed(packed: PackedWeight, dtype: torch.dtype, name: str) -> PackedWeight:
    """Returns the same weight in another dtype, as ``model.to(dtype)`` asks for."""
    data = fold_weight(packed.unpack().to(dtype), packed.weight_format, name)
    return replace(packed, dtype=dtype, data=data)
