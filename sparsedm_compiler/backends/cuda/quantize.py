"""The custom op ``sparsedm::quantize_rows``: every row rounded to 8 bits by a factor of its own.

A norm (with the scale and shift of adaLN) or an activation in front of it is part of the same
kernel, which reads x once and writes a byte for each number.
"""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ...triton_support import is_interpreted, on_device_of
from ..custom_op import apply_activation

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The dtype and its largest number, by name."""
NORMS = ("none", "layer", "rms")
TOKENS = 16
"""The rows of the result are a multiple of this, as cuSPARSELt wants; those behind are zeros."""
MOST_COLS = 1 << 15
"""Columns that one program holds."""

_TINY = torch.finfo(torch.float32).tiny
_PROGRAM = 4096  # numbers of a program, where rows are shorter


def quantize(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Returns (8-bit numbers, factors [rows, 1]) whose product is ``values`` [rows, cols], rounded.

    The largest magnitude of a row becomes the largest number of the kind; of two numbers as near
    the even one is taken. A row that is not finite becomes zeros with the factor NaN, so that
    products with it are NaN, as they would be dense.
    """
    dtype, largest = KINDS[kind]
    wide = values.float()
    sound = wide.isfinite().all(1, keepdim=True)
    wide = torch.where(sound, wide, 0)
    most = wide.abs().amax(1, keepdim=True)
    factors = (most * (1 / largest)).clamp_min(_TINY)
    scaled = wide * (1 / factors)
    rounded = (scaled.round() if kind == "int8" else scaled).to(dtype)
    return rounded, torch.where(sound, factors, torch.nan)


def normalize(
    x: Tensor,
    act: str,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    epsilon: float,
) -> Tensor:
    """Returns what ``quantize_rows`` rounds, in float32: [batch, tokens, cols] or [tokens, cols].

    act, norm: of ``custom_op.ACTS`` and NORMS. weight, bias: [cols]. scale, shift: [batch, cols],
    of adaLN: y * (1 + scale) + shift.
    """
    y = apply_activation(x.float(), act)
    if norm == "layer":
        y = F.layer_norm(y, y.shape[-1:], eps=epsilon)
    elif norm == "rms":
        y = F.rms_norm(y, y.shape[-1:], eps=epsilon)
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    if scale is not None and shift is not None:
        y = y * (1 + scale.float()[:, None]) + shift.float()[:, None]
    return y


@torch.library.custom_op("sparsedm::quantize_rows", mutates_args=())
def _quantize_rows(
    x: Tensor,
    kind: str,
    act: str,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    y = normalize(x, act, norm, weight, bias, scale, shift, epsilon)
    flat = y.reshape(-1, y.shape[-1])
    rounded, factors = quantize(F.pad(flat, (0, 0, 0, -len(flat) % TOKENS)), kind)
    return rounded, factors.view(-1)


@_quantize_rows.register_kernel("cuda")
def run_quantize_rows(
    x: Tensor,
    kind: str,
    act: str,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Returns the same by the Triton kernel, which reads x once."""
    from .triton_kernels import quantize_kernel

    dtype, largest = KINDS[kind]
    by_bits = kind == "fp8" and is_interpreted()
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    tokens, cols = flat.shape
    out = x.new_empty(tokens + -tokens % TOKENS, cols, dtype=dtype)
    factors = x.new_empty(len(out), dtype=torch.float32)
    width = 1 << (cols - 1).bit_length()
    height = max(1, min(TOKENS, _PROGRAM // width))
    written = out.view(torch.uint8) if by_bits else out
    plain = [None if t is None else t.contiguous() for t in (weight, bias, scale, shift)]
    if len(out):
        with on_device_of(x):
            quantize_kernel[(ceil(len(out) / height),)](
                *(flat, *plain, written, factors),
                *(tokens, len(out), cols, flat.stride(0)),
                per_batch=1 if scale is None else max(1, tokens // len(scale)),
                epsilon=epsilon,
                NORM=norm,
                ACT=act,
                LARGEST=largest,
                INTEGER=kind == "int8",
                BY_BITS=by_bits,
                BLOCK_TOKENS=height,
                BLOCK_COLS=width,
                num_warps=min(32, max(4, height * width // 1024)),
            )
    return out, factors


@_quantize_rows.register_fake
def _fake(
    x: Tensor,
    kind: str,
    act: str,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    tokens = x.numel() // x.shape[-1]
    padded = (tokens + TOKENS - 1) // TOKENS * TOKENS
    return (
        x.new_empty(padded, x.shape[-1], dtype=KINDS[kind][0]),
        x.new_empty(padded, dtype=torch.float32),
    )


quantize_rows_op = torch.ops.sparsedm.quantize_rows.default


def quantize_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Returns (8-bit numbers [tokens, cols], factors [tokens]) of x [..., cols].

    The tokens are padded to a multiple of TOKENS.
    """
    rounded, factors = quantize_rows_op(x, kind, "none", "none", None, None, None, None, 0.0)
    return rounded, factors


def round_rows(
    x: Tensor,
    kind: str,
    act: str = "none",
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns ``quantize_rows`` of what ``normalize`` gives, in one kernel.

    scale, shift: [batch, 1, cols]. Where a gradient is wanted, which rounding has none of, it
    returns (what ``normalize`` gives, in the dtype of x; nothing), for the op that has one.
    """
    tensors = [one for one in (x, weight, bias, scale, shift) if one is not None]
    scale = None if scale is None else scale.flatten(0, 1)
    shift = None if shift is None else shift.flatten(0, 1)
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        y = normalize(x, act, norm, weight, bias, scale, shift, epsilon)
        return y.to(x.dtype), x.new_empty(0)
    rounded, factors = quantize_rows_op(x, kind, act, norm, weight, bias, scale, shift, epsilon)
    return rounded, factors
