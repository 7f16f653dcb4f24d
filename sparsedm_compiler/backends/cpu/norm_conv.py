"""The custom op ``sparsedm::nm_norm_conv2d``: a convolution behind GroupNorm and an activation.

The kernel copies the input of a convolution into padded planes in any case. There it normalizes and
activates as well, so that no normalized tensor is written and read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ..custom_op import (
    ACTS,
    apply_activation,
    cast_bias,
    compute_conv_shape,
    lay_out_as,
    register_without_gradient,
)
from .build import why_unavailable
from .ops import describe_conv, lay_out_bias, reference_conv2d, run_call


class _Norm(NamedTuple):
    """What lies in front of a convolution of x [N, C, H, W]: ``act(GroupNorm(x + offset))``.

    Attributes:
        offset: [N, C, 1, 1] or [1, C, 1, 1]; None for nothing.
        weight: The norm's scale, [C]; None for 1.
        bias: The norm's shift, [C]; None for 0.
        groups: Number of groups.
        epsilon: What is added to the variance.
        act: "none" or "silu".
    """

    offset: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    groups: int
    epsilon: float
    act: str

    def require_fit(self, x: Tensor) -> None:
        """Raises KernelError for a norm that does not fit x."""
        images, channels = x.shape[:2]
        shapes = ((channels,), (channels, 1, 1))
        affine = all(v is None or v.shape == shapes[0] for v in (self.weight, self.bias))
        offset = self.offset
        moved = offset is None or (
            offset.dim() == 4 and offset.shape[1:] == shapes[1] and len(offset) in (1, images)
        )
        whole = self.groups >= 1 and channels % self.groups == 0
        if not (affine and moved and whole and self.act in ("none", "silu")):
            raise KernelError(
                f"a norm of {self.groups} groups and {self.act!r} does not fit x of {list(x.shape)}"
            )


def run_norm_conv2d(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, *rest: Any
) -> Tensor:
    """Returns act(W * norm(x) + b): [N, C, H, W] -> [N, rows, H', W']; the norm is in float32.

    rest: The norm, then geometry, activation and tile, as in the schema. Raises KernelError for a
    norm that does not fit x.
    """
    if why_unavailable() is not None:
        told = _fake(x, packed, bias, rows, *rest)
        return lay_out_as(told, reference_norm_conv2d(x, packed, bias, rows, *rest))
    norm, geometry, (act, tile) = _Norm(*rest[:6]), rest[6:10], rest[10:]
    norm.require_fit(x)
    x, bias = x.contiguous(), lay_out_bias(bias, rows)
    call, out = describe_conv(x, packed, bias, rows, geometry, act, tile)
    kept = [_read(values) for values in norm[:3]]
    call.offset, call.norm_weight, call.norm_bias = (
        None if values is None else values.data_ptr() for values in kept
    )
    if norm.offset is not None and len(norm.offset) > 1:
        call.offset_stride = x.shape[1]
    call.groups, call.epsilon, call.pre_act = norm.groups, norm.epsilon, ACTS.index(norm.act)
    run_call(call)
    return out


def _read(values: Tensor | None) -> Tensor | None:
    """Returns numbers as the kernel reads them."""
    return None if values is None else values.to(torch.float32).contiguous()


def reference_norm_conv2d(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, *rest: Any
) -> Tensor:
    """Returns the result of ``run_norm_conv2d``, by the dense ops."""
    norm = _Norm(*rest[:6])
    norm.require_fit(x)
    moved = x if norm.offset is None else x + norm.offset
    affine = cast_bias(x, norm.weight), cast_bias(x, norm.bias)
    normal = F.group_norm(moved, norm.groups, *affine, norm.epsilon)
    return reference_conv2d(apply_activation(normal, norm.act), packed, bias, rows, *rest[6:])


def _fake(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, *rest: Any) -> Tensor:
    return x.new_empty(compute_conv_shape(x, rows, *rest[6:10]))


nm_norm_conv2d_op = register_without_gradient(
    "nm_norm_conv2d",
    "Tensor x, Tensor packed, Tensor? bias, int rows, Tensor? offset, Tensor? norm_weight, "
    "Tensor? norm_bias, int groups, float epsilon, str pre_act, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, str act, int tile",
    {"CPU": run_norm_conv2d},
    fake=_fake,
)
