"""A weight as the matrix that kernels multiply by, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def matrix(weight: Tensor) -> Tensor:
    """[rows, cols], contiguous; the channels of every tap of a kernel lie side by side.

    weight: [rows, cols] or [rows, channels, kh, kw].
    """
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    return weight.flatten(1).contiguous()


def from_matrix(dense: Tensor, kernel: Sequence[int]) -> Tensor:
    """The inverse of ``matrix``: [rows, channels, kh, kw], contiguous; kernel () is for Linear."""
    if not kernel:
        return dense
    return dense.view(dense.shape[0], *kernel, -1).permute(0, 3, 1, 2).contiguous()
