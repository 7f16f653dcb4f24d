"""The custom op ``sparsedm::nm_norm_conv2d``: a convolution behind GroupNorm and an activation.

The kernel copies the input of a convolution into padded planes in any case. There it normalizes and
activates as well, so that no normalized tensor is written and read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ..custom_op import (
    ACTS,
    apply_activation,
    cast_bias,
    compute_conv_shape,
    register_without_gradient,
)
from .build import why_unavailable
from .ops import describe_conv, lay_out_bias, reference_conv2d, run_call


def run_norm_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    offset: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    epsilon: float,
    pre_act: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
    tile: int,
) -> Tensor:
    """Returns act(W * pre_act(GroupNorm(x + offset)) + b): [N, C, H, W] -> [N, rows, H', W'].

    The norm is computed in float32. ``offset`` is [N, C, 1, 1] or [1, C, 1, 1], ``norm_weight`` and
    ``norm_bias`` [C]; None for nothing, 1 and 0. ``pre_act``: "none" or "silu". Raises KernelError
    for a norm that does not fit x.
    """
    norm = offset, norm_weight, norm_bias, groups, epsilon, pre_act
    geometry = kernel, stride, padding, dilation
    if why_unavailable() is not None:
        return reference_norm_conv2d(x, packed, bias, rows, *norm, *geometry, act, tile)
    _check_norm(x, offset, norm_weight, norm_bias, groups, pre_act)
    x, bias = x.contiguous(), lay_out_bias(bias, rows)
    call, out = describe_conv(x, packed, bias, rows, geometry, act, tile)
    kept = [_read(values) for values in (offset, norm_weight, norm_bias)]
    call.offset, call.norm_weight, call.norm_bias = (
        None if values is None else values.data_ptr() for values in kept
    )
    if offset is not None and len(offset) > 1:
        call.offset_stride = offset.shape[1]
    call.groups, call.epsilon, call.pre_act = groups, epsilon, ACTS.index(pre_act)
    run_call(call)
    return out


def _read(values: Tensor | None) -> Tensor | None:
    """Returns numbers as the kernel reads them."""
    return None if values is None else values.to(torch.float32).contiguous()


def _check_norm(
    x: Tensor,
    offset: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    pre_act: str,
) -> None:
    images, channels = x.shape[:2]
    sizes = {1, images}
    fits = offset is None or (
        offset.shape[1:] == (channels, 1, 1) and offset.dim() == 4 and len(offset) in sizes
    )
    affine = all(v is None or v.shape == (channels,) for v in (norm_weight, norm_bias))
    if not fits or not affine or groups < 1 or channels % groups or pre_act not in ("none", "silu"):
        raise KernelError(
            f"a norm of {groups} groups and {pre_act!r} does not fit x of {list(x.shape)}"
        )


def reference_norm_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    offset: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    epsilon: float,
    pre_act: str,
    *rest: Any,
) -> Tensor:
    """Returns the result of ``run_norm_conv2d``, by the dense ops."""
    _check_norm(x, offset, norm_weight, norm_bias, groups, pre_act)
    moved = x if offset is None else x + offset
    normal = F.group_norm(
        moved, groups, cast_bias(x, norm_weight), cast_bias(x, norm_bias), epsilon
    )
    return reference_conv2d(apply_activation(normal, pre_act), packed, bias, rows, *rest)


def _fake(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, *rest: Any) -> Tensor:
    geometry = rest[6:10]  # behind the six arguments of the norm
    return x.new_empty(compute_conv_shape(x, rows, *geometry))


nm_norm_conv2d_op = register_without_gradient(
    "nm_norm_conv2d",
    "Tensor x, Tensor packed, Tensor? bias, int rows, Tensor? offset, Tensor? norm_weight, "
    "Tensor? norm_bias, int groups, float epsilon, str pre_act, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, str act, int tile",
    {"CPU": run_norm_conv2d},
    fake=_fake,
)
