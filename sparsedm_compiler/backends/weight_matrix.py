"""A weight as the matrix that kernels multiply by, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def to_matrix(weight: Tensor) -> Tensor:
    """Returns [rows, cols], contiguous; the channels of every tap of a kernel lie side by side.

    weight: [rows, cols] or [rows, channels, kh, kw].
    """
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    return weight.flatten(1).contiguous()


def from_matrix(dense: Tensor, kernel: Sequence[int]) -> Tensor:
    """Returns [rows, channels, kh, kw], contiguous: the inverse of ``to_matrix``.

    kernel: the size of a conv2d's kernel; () for Linear, whose matrix is returned as it is.
    """
    if not kernel:
        return dense
    return dense.view(dense.shape[0], *kernel, -1).permute(0, 3, 1, 2).contiguous()
