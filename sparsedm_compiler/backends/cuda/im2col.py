"""Conv2d as a linear layer over the patches of its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..custom_op import fake_conv2d, is_channels_last, register
from ..kernel_family import MatmulProblem, OpCall

Linear = Callable[..., Tensor]


def conv_as_linear(name: str, linear: Linear, arguments: str) -> Linear:
    """The op ``sparsedm::name``, a conv2d that is ``linear`` over patches.

    ``linear``: an op (x [..., cols], packed, bias, rows, *how) -> [..., rows], ``arguments``: the
    schema of its ``how``. What comes back takes (x [N, C, H, W], packed, bias, rows, kernel,
    stride, padding, dilation, *how), the weight packed from ``matrix`` of [rows, C, kh, kw], and
    gives [N, rows, H', W'], channels_last if x is. It is one op, since Inductor cannot follow
    strides of images whose sizes are symbols back through a matrix of patches.
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
        *how: Any,
    ) -> Tensor:
        found = patches(x, kernel, stride, padding, dilation)
        images, height, width, cols = found.shape
        out = linear(found.reshape(images * height * width, cols), packed, bias, rows, *how)
        out = out.view(images, height, width, rows).permute(0, 3, 1, 2)
        # Whoever reads it was traced with the strides of the dense convolution.
        return out if is_channels_last(x) else out.contiguous()

    schema = f"int[] kernel, int[] stride, int[] padding, int[] dilation, {arguments}"
    runs = {"CPU": conv2d, "CUDA": conv2d}
    return register(name, schema, runs, fake=fake_conv2d, reference=conv2d)


def linear_or_conv(linear: Linear, conv: Linear, work: MatmulProblem, *how: Any) -> OpCall:
    """What does the work, a linear layer or the same as a convolution, and its arguments."""
    if not work.kernel:
        return linear, how
    geometry = (work.kernel, work.stride, work.padding, work.dilation)
    return conv, (*map(list, geometry), *how)


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """[N, H', W', kh * kw * C]: what each output sees of x [N, C, H, W], by taps, then channels.

    A view for a 1x1 kernel over channels_last; else one gathering copy.
    """
    image = x.permute(0, 2, 3, 1)
    if any(padding):
        image = F.pad(image, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    for place in (0, 1):
        span = dilation[place] * (kernel[place] - 1) + 1
        image = image.unfold(1 + place, span, stride[place])
    image = image[..., :: dilation[0], :: dilation[1]]  # [N, H', W', C, kh, kw]
    return image.permute(0, 1, 2, 4, 5, 3).flatten(3)
