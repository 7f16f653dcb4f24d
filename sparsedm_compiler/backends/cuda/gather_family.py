"""The gather kernels as a family."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import PackError
from ...pattern import Pattern
from ..family import Call, Family, Form, Kernel, Work
from ..matrix import from_matrix, matrix
from .conv import conv_as_linear, linear_or_conv
from .gather import TYPES, gather_linear_op, pack, refusal, settings, unpack, views
from .launching import unavailable
from .support import card, machine, no_tensor_cores

gather_conv2d_op = conv_as_linear("gather_conv2d", gather_linear_op, "str act, int[] how")


class GatherFamily(Family):
    """Kernels for weights of which many rows share a mask.

    Layout of a Kernel: (place of the dtype in TYPES). Tile: as ``settings``, behind the pattern.
    """

    device = "cuda"
    names = ("cuda_gather",)

    def unavailable(self) -> str | None:
        return no_tensor_cores(card()) or unavailable()

    def refusal(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        return refusal(pattern, rows, cols, dtype)

    def candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[Kernel, ...]:
        layout = (TYPES.index(dtype),)
        return tuple(Kernel("cuda_gather", layout, how[3:]) for how in settings(pattern, dtype))

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: Kernel) -> Tensor:
        return pack(matrix(weight.detach()), matrix(mask), pattern)

    def unpack(self, packed: Tensor, shape: tuple[int, ...], form: Form) -> Tensor:
        size, dtype = (shape[0], math.prod(shape[1:])), _dtype(form)
        return from_matrix(unpack(packed, *size, form.pattern, dtype), shape[2:])

    def check(self, packed: Tensor, shape: tuple[int, ...], form: Form) -> torch.dtype:
        size, dtype = (shape[0], math.prod(shape[1:])), _dtype(form)
        why = refusal(form.pattern, *size, dtype)
        if why is not None:
            raise PackError(f"no weight of {list(shape)} is packed to {form.pattern}: {why}")
        _, columns = views(packed, *size, form.pattern, dtype)
        if bool((columns < 0).any()) or bool((columns >= size[1]).any()):
            raise PackError("the packed weight points outside of its columns")
        return dtype

    def call(self, work: Work, form: Form, tile: tuple[int, ...]) -> Call:
        pattern = form.pattern
        how = [pattern.n, pattern.m, pattern.rows, *tile]
        return linear_or_conv(gather_linear_op, gather_conv2d_op, work, work.act, how)

    def machine(self) -> tuple[Any, ...]:
        return machine()


def _dtype(form: Form) -> torch.dtype:
    """Of the values that a form holds."""
    assert form.kernel is not None
    (place,) = form.kernel.layout
    return TYPES[place]
