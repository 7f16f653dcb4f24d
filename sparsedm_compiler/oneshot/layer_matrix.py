"""Weights and the inputs of their layers as matrices: one row per output, one column per weight.

The columns of a convolution are ordered by kernel position, then input channel, so that the groups
of a pattern, which run along the input channels, are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError

CHUNK = 1 << 24
"""Numbers of patches that are made at a time."""


def to_matrix(weight: Tensor) -> Tensor:
    """Returns a weight [out, in, *kernel] as [out, positions * in], in float64."""
    return weight.detach().to(torch.float64).movedim(1, -1).reshape(len(weight), -1)


def from_matrix(matrix: Tensor, like: Tensor) -> Tensor:
    """Returns the weight of ``to_matrix``, in the shape and dtype of ``like``."""
    out, channels, *kernel = like.shape
    return matrix.reshape(out, *kernel, channels).movedim(-1, 1).to(like.dtype)


def count_columns(shape: tuple[int, ...]) -> int:
    """Returns the columns of the matrix of a weight of that shape."""
    return math.prod(shape[1:])


def iterate_rows(values: Mapping[str, Any], op: str, width: int) -> Iterator[Tensor]:
    """Yields what a product multiplies its weight by, as matrices [tokens, columns] in float32.

    Args:
        values: The arguments of the op by name.
        op: Its name in the table of ops.
        width: The columns of the weight's matrix.

    Raises:
        DataError: The op takes its inputs in no form that is known.
    """
    if op == "linear":
        yield values["input"].reshape(-1, width).float()
    elif op.startswith("conv"):
        yield from _iterate_patches(values, int(op[4]), width)
    else:
        raise DataError(f"the inputs of {op} cannot be seen")


def _iterate_patches(values: Mapping[str, Any], dims: int, width: int) -> Iterator[Tensor]:
    """Yields the patches of a convolution over ``dims`` dimensions, some images at a time."""
    kernel = values["weight"].shape[2:]
    stride, dilation = (_expand(values.get(name, 1), dims) for name in ("stride", "dilation"))
    x: Tensor = values["input"].float()
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    x = _pad(x, values.get("padding", 0), kernel, dilation)
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [(n - s) // t + 1 for n, s, t in zip(x.shape[2:], span, stride, strict=True)]
    for part in torch.split(x, max(1, CHUNK // max(1, math.prod(sizes) * width))):
        for d in range(dims):
            part = part.unfold(2 + d, span[d], stride[d])[..., :: dilation[d]]
        order = [0, *range(2, 2 + dims), *range(2 + dims, 2 + 2 * dims), 1]
        yield part.permute(order).reshape(-1, width)


def _expand(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _pad(x: Tensor, padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Returns an input with the zeros that its convolution pads it by."""
    if padding == "valid":
        return x
    if padding == "same":
        totals = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(n, n) for n in _expand(padding, len(kernel))]
    return F.pad(x, [n for pair in reversed(sides) for n in pair])
