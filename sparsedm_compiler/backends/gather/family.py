"""The gather kernels as a family."""

from __future__ import annotations

from typing import Any

import torch

from ...patterns import Pattern
from ...triton_support import unavailable
from ..cuda.device import card, machine, no_tensor_cores
from ..cuda.im2col import conv_as_linear, linear_or_conv
from ..cuda.raw_format import BareFamily
from ..kernel_family import KernelConfig, MatmulProblem, OpCall, WeightFormat
from . import ops as gather

gather_conv2d_op = conv_as_linear("gather_conv2d", gather.gather_linear_op, "str act, int[] how")


class GatherFamily(BareFamily):
    """Kernels for weights of which many rows share a mask.

    Tile of a Kernel: as ``gather.settings``, behind the pattern.
    """

    device = "cuda"
    names = ("cuda_gather",)
    format = gather

    def unavailable(self) -> str | None:
        return no_tensor_cores(card()) or unavailable()

    def candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        layout, settings = (gather.TYPES.index(dtype),), gather.settings(pattern, dtype)
        return tuple(KernelConfig("cuda_gather", layout, how[3:]) for how in settings)

    def call(self, work: MatmulProblem, form: WeightFormat, tile: tuple[int, ...]) -> OpCall:
        pattern = form.pattern
        how = [pattern.n, pattern.m, pattern.height, *tile]
        return linear_or_conv(gather.gather_linear_op, gather_conv2d_op, work, work.act, how)

    def machine(self) -> tuple[Any, ...]:
        return machine()
