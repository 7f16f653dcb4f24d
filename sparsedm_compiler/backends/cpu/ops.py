"""The custom ops ``sparsedm::nm_linear`` and ``sparsedm::nm_conv2d``: act(W x + b), W packed.

Each has a kernel, a reference that needs none (unpack, then dense), a fake and a gradient for x.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError, PackError
from ..custom_op import (
    ACTS,
    apply_activation,
    cast_bias,
    compute_conv_shape,
    fake_conv2d,
    fake_linear,
    is_channels_last,
    lay_out_as,
    register,
)
from ..weight_matrix import from_matrix
from .abi import MIXED, NHWC, PLANES, KernelArguments
from .build import load_library, why_unavailable
from .format import HEADER_BYTES, TYPES, unpack
from .isa import ISAS, select_isa

CACHE_BYTES = 0
"""The second-level cache that work is cut for, in bytes; 0 is this CPU's. Tests cut for others."""
_POINT = ((1, 1), (1, 1), (0, 0), (1, 1))  # the geometry of a 1x1 conv
_TYPE_CODES = {dtype: code for code, dtype in enumerate(TYPES)}


def run_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, act: str, tile: int
) -> Tensor:
    """Returns act(W x + b) by the kernel: x [..., cols] of the packed dtype -> [..., rows]."""
    if why_unavailable() is not None:
        return reference_linear(x, packed, bias, rows, act, tile)
    *sizes, cols = x.shape
    flat, stride, images = x, cols, None
    if not x.is_contiguous():
        images = count_images(x)
        if images is None:
            flat = x.reshape(-1, cols)
            if flat.stride(-1) != 1 or flat.stride(0) < cols:
                flat = flat.contiguous()
            stride = flat.stride(0)
    out = x.new_empty((*sizes, rows))
    _check(packed, rows, cols)
    bias = lay_out_bias(bias, rows)
    call = _describe_call(flat, packed, bias, out, act, tile)
    call.tokens, call.x_stride, call.out_stride = math.prod(sizes), stride, rows
    if images is not None:
        call.form = MIXED
        size = (1, call.tokens // images)
        _describe_geometry(call, (images, cols, *size), size, _POINT)
    run_call(call)
    return out


def count_images(x: Tensor) -> int | None:
    """Returns n if x [..., cols] lies in memory as [n, cols, tokens], as attention reads images."""
    *sizes, _ = x.shape
    for dims in range(min(2, len(sizes))):
        if x.movedim(-1, dims).is_contiguous():
            return math.prod(sizes[:dims])
    return None


def run_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
    tile: int,
) -> Tensor:
    """Returns act(W * x + b) by the kernel: [N, C, H, W] -> [N, rows, H', W'], laid out as x is."""
    geometry = kernel, stride, padding, dilation
    if why_unavailable() is not None:
        told = fake_conv2d(x, packed, bias, rows, *geometry)
        return lay_out_as(told, reference_conv2d(x, packed, bias, rows, *geometry, act, tile))
    form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    x = x.contiguous(memory_format=form)
    bias = lay_out_bias(bias, rows)
    call, out = describe_conv(x, packed, bias, rows, geometry, act, tile)
    run_call(call)
    return out


def reference_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, act: str, tile: int
) -> Tensor:
    """Returns the result of ``run_linear``, by the dense op."""
    return apply_activation(F.linear(x, unpack(packed).to(x.dtype), cast_bias(x, bias)), act)


def reference_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
    tile: int,
) -> Tensor:
    """Returns the result of ``run_conv2d``, by the dense op."""
    weight = unpack_weight(packed, kernel).to(x.dtype)
    out = F.conv2d(x, weight, cast_bias(x, bias), stride, padding, dilation)
    return apply_activation(out, act)


def unpack_weight(packed: Tensor, kernel: Sequence[int]) -> Tensor:
    """Returns the masked dense weight, [rows, channels, kh, kw]; kernel () is for Linear."""
    return from_matrix(unpack(packed), kernel)


def lay_out_bias(bias: Tensor | None, rows: int) -> Tensor | None:
    """Returns the bias as a kernel reads it: one value per row, side by side."""
    if bias is None:
        return None
    if bias.shape != (rows,):
        raise KernelError(f"a bias of {list(bias.shape)} is not one value for each of {rows} rows")
    return bias.contiguous()


def _describe_call(
    x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, act: str, tile: int
) -> KernelArguments:
    x_type = _TYPE_CODES.get(x.dtype)
    bias_type = 0 if bias is None else _TYPE_CODES.get(bias.dtype)
    if x_type is None or bias_type is None:
        dtypes = x.dtype if bias is None else f"{x.dtype} with a bias of {bias.dtype}"
        raise KernelError(f"the CPU kernels take float32 and bfloat16, not {dtypes}")
    call = KernelArguments(  # by position, as by name takes twice as long
        packed.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x_type,
        bias_type,
        ACTS.index(act),
    )
    call.tile, call.threads, call.isa = tile, torch.get_num_threads(), _find_isa_code()
    call.cache = CACHE_BYTES
    return call


def describe_conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    geometry: tuple[Sequence[int], ...],
    act: str,
    tile: int,
) -> tuple[KernelArguments, Tensor]:
    """Returns the call of a conv, and its output, which is laid out as x is."""
    kernel, stride, padding, _ = geometry
    channels_last = is_channels_last(x)
    form = torch.channels_last if channels_last else torch.contiguous_format
    shape = compute_conv_shape(x, rows, *geometry)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    images, channels, height, width = x.shape
    size: Sequence[int] = out.shape[2:]
    _check(packed, rows, channels * kernel[0] * kernel[1])
    call = _describe_call(x, packed, bias, out, act, tile)
    call.form = NHWC if channels_last else PLANES
    call.tokens, call.out_stride = images * math.prod(size), rows
    if (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0):  # a plane is one long row
        height, width = size = 1, height * width
    _describe_geometry(call, (images, channels, height, width), size, geometry)
    return call, out


def _describe_geometry(
    call: KernelArguments,
    shape: Sequence[int],
    out_size: Sequence[int],
    geometry: tuple[Sequence[int], ...],
) -> None:
    """Writes the shape of the images, height and width of the output, and the kernel's sizes."""
    call.images, call.channels, call.height, call.width = shape
    call.out_height, call.out_width = out_size
    kernel, stride, padding, dilation = geometry
    call.kernel_h, call.kernel_w = kernel
    call.stride_h, call.stride_w = stride
    call.pad_h, call.pad_w = padding
    call.dil_h, call.dil_w = dilation


@cache
def _find_isa_code() -> int:
    return ISAS.index(select_isa())


def _check(packed: Tensor, rows: int, cols: int) -> None:
    """Raises PackError unless the header, which the kernel trusts, is of a weight of this size."""
    address = packed.data_ptr()
    plain = packed.dtype is torch.uint8 and packed.is_contiguous() and address % 8 == 0
    small = not plain or packed.numel() < HEADER_BYTES
    stated = None if small else _Sizes.from_address(address)
    if stated is None or stated.rows != rows or stated.cols != cols:
        raise PackError(
            f"the packed weight is not one of {rows} x {cols}, its bytes side by side from a "
            "multiple of 8"
        )


class _Sizes(ctypes.Structure):
    """The part of a packed weight's header that tells its size."""

    _fields_ = (
        ("before", ctypes.c_int32 * 3),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
    )


def run_call(call: KernelArguments) -> None:
    """Runs the kernel. Raises KernelError where it cannot."""
    failed = load_library().sdm_run(ctypes.byref(call))
    if failed:
        raise KernelError(
            "a CPU kernel ran out of memory"
            if failed == 1
            else "a weight packed for bfloat16 takes bfloat16 activations"
        )


nm_linear_op = register(
    "nm_linear",
    "str act, int tile",
    {"CPU": run_linear},
    fake=fake_linear,
    reference=reference_linear,
)
nm_conv2d_op = register(
    "nm_conv2d",
    "int[] kernel, int[] stride, int[] padding, int[] dilation, str act, int tile",
    {"CPU": run_conv2d},
    fake=fake_conv2d,
    reference=reference_conv2d,
)
