"""Runs a conv2d as a linear layer over the patches of its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..custom_op import fake_conv2d, is_channels_last, register
from ..kernel_family import Op


def register_conv(name: str, linear: Op, arguments: str) -> Op:
    """Registers the op ``sparsedm::name``, a conv2d that is ``linear`` over patches.

    It is one op, since Inductor cannot follow strides of images whose sizes are symbols back
    through a matrix of patches.

    Args:
        name: Name of the op in the namespace "sparsedm".
        linear: An op (x [..., cols], packed, bias, rows, ``arguments``) -> [..., rows].
        arguments: Schema of the arguments of ``linear`` behind ``rows``.

    Returns:
        The op (x [N, C, H, W], packed, bias, rows, kernel, stride, padding, dilation,
        ``arguments``) -> [N, rows, H', W'], channels_last if x is. Its weight is packed from
        ``to_matrix`` of [rows, C, kh, kw].
    """

    def conv2d(
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        rows: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        *linear_arguments: Any,
    ) -> Tensor:
        patches = extract_patches(x, kernel, stride, padding, dilation)
        images, height, width, cols = patches.shape
        tokens = patches.reshape(images * height * width, cols)
        out = linear(tokens, packed, bias, rows, *linear_arguments)
        out = out.view(images, height, width, rows).permute(0, 3, 1, 2)
        # Its reader was traced with the strides of the dense convolution.
        return out if is_channels_last(x) else out.contiguous()

    schema = f"int[] kernel, int[] stride, int[] padding, int[] dilation, {arguments}"
    runs = {"CPU": conv2d, "CUDA": conv2d}
    return register(name, schema, runs, fake=fake_conv2d, reference=conv2d)


def extract_patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Returns the inputs of every output of a conv2d over x [N, C, H, W].

    [N, H', W', kh * kw * C], by taps, then channels: a view for a 1x1 kernel over channels_last,
    else one gathering copy.
    """
    image = x.permute(0, 2, 3, 1)
    if any(padding):
        image = F.pad(image, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    for axis in (0, 1):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        image = image.unfold(1 + axis, span, stride[axis])
    image = image[..., :: dilation[0], :: dilation[1]]  # [N, H', W', C, kh, kw]
    return image.permute(0, 1, 2, 4, 5, 3).flatten(3)
