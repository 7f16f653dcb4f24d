"""The custom op ``sparsedm::wgmma_linear``: act(x W^T + b) by wgmma.cu, and its reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ...patterns import Pattern
from ..cuda.im2col import register_conv
from ..cuda.token_padding import ALIGN, align
from ..custom_op import apply_activation, check_bias, fake_linear, register
from .build import Tile
from .format import choose_layout, unpack
from .launch import launch_linear

SCHEMA = "str act, str pattern, int[] tile"
"""The arguments of the op behind ``rows``: the activation, the pattern as text, the tile.

``tile`` is (tokens, warpgroups, slices, raster), as ``build.Tile``.
"""


def reference_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    pattern: str,
    tile: Sequence[int],
) -> Tensor:
    """Returns the result of ``run_linear``: sums, bias and activation in float32, rounded once."""
    weight = unpack(packed, rows, x.shape[-1], Pattern.parse(pattern), x.dtype).float()
    sums = F.linear(x.float(), weight, None if bias is None else bias.float())
    return apply_activation(sums, act).to(x.dtype)


def run_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    pattern: str,
    tile: Sequence[int],
) -> Tensor:
    """Returns act(W x + b) by the kernel: x [..., cols] in half precision -> [..., rows]."""
    cols = x.shape[-1]
    layout = choose_layout(Pattern.parse(pattern), rows, cols)
    if packed.shape != (layout.units * layout.stages * layout.unit_bytes,):
        raise KernelError(f"the packed weight is not one of {rows} x {cols} to {pattern}")
    check_bias(bias, rows, x.dtype)
    out = x.new_empty(*x.shape[:-1], rows)
    if out.numel():
        flat = align_rows(x.reshape(-1, cols))
        bias = None if bias is None else bias.contiguous()
        launch_linear(flat, packed, bias, out.view(-1, rows), layout, Tile(*tile), act)
    return out


def align_rows(flat: Tensor) -> Tensor:
    """Returns a matrix whose rows begin where the tensor copy engine reads: a copy if need be."""
    tokens, cols = flat.shape
    if tokens == 1 and flat.stride(1) == 1:
        flat = flat.as_strided((1, cols), (cols, 1))  # of one row torch takes any stride for right
    step = ALIGN // flat.element_size()
    strides = flat.stride(1) == 1 and flat.stride(0) % step == 0 and flat.stride(0) >= cols
    return flat if strides and flat.data_ptr() % ALIGN == 0 else align(flat)


wgmma_linear_op = register(
    "wgmma_linear",
    SCHEMA,
    {"CPU": reference_linear, "CUDA": run_linear},
    fake=fake_linear,
    reference=reference_linear,
)
wgmma_conv2d_op = register_conv("wgmma_conv2d", wgmma_linear_op, SCHEMA)
