"""V:n:m weights on sparse tensor cores: act(x W^T + b) by vnm.cu, and its reference in torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ...patterns import VNM
from ..custom_op import apply_activation, check_bias, register
from .format import Layout, unpack
from .launch import (
    Launch,
    LaunchArguments,
    Tile,
    find_address,
    make_launch,
    specify_linear,
    specify_transpose,
)

_PIECE = 8  # values of 16 bytes
_TURNED = 64  # tokens and columns that a block of to_feature_major turns
_MOST_BLOCKS = 65535  # of a grid along y


SCHEMA = "str act, int n, int m, int rows_per_block, int[] tile, bool feature_major"
"""The arguments of the op behind ``rows``: the activation, the pattern, the tile, the layout.

``tile`` is (tokens of a warp, warps over rows, warps over tokens, stages). With ``feature_major``
the tokens of the output lie side by side in memory.
"""


def count_warp_rows(rows_per_block: int) -> int:
    """Returns the rows of a warp: all of them share their columns."""
    return next(rows for rows in (64, 32, 16) if rows_per_block % rows == 0)


def reference_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    n: int,
    m: int,
    rows_per_block: int,
    tile: Sequence[int],
    feature_major: bool,
) -> Tensor:
    """Returns the result of ``run_linear``: sums, bias and activation in float32, rounded once."""
    weight = unpack(packed, rows, x.shape[-1], VNM(n, m, rows_per_block), x.dtype).float()
    sums = F.linear(x.float(), weight, None if bias is None else bias.float())
    out = apply_activation(sums, act).to(x.dtype)
    return _allocate(out, rows, feature_major)[0].copy_(out) if feature_major else out


def run_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    n: int,
    m: int,
    rows_per_block: int,
    tile: Sequence[int],
    feature_major: bool,
    *,
    launch: Launch | None = None,
) -> Tensor:
    """Returns act(W x + b) by the kernel: x [..., cols] in half precision -> [..., rows]."""
    cols = x.shape[-1]
    layout = Layout(rows, cols, VNM(n, m, rows_per_block))
    _check(x, packed, bias, layout)
    launch = launch or make_launch(x.device)
    flat = x.reshape(-1, cols)
    tokens = flat.shape[0]
    out, out_stride = _allocate(x, rows, feature_major)
    cut = Tile(count_warp_rows(rows_per_block), *tile)
    most = _MOST_BLOCKS * min(_TURNED, cut.tokens)
    if tokens > most:
        setting = act, n, m, rows_per_block, tile, feature_major
        for first in range(0, tokens, most):
            part = flat[first : first + most]
            results = run_linear(part, packed, bias, rows, *setting, launch=launch)
            out.view(-1, rows)[first : first + most] = results
    if not 0 < tokens <= most:
        return out
    flat = _make_feature_major(flat, launch)
    bias = None if bias is None else bias.contiguous()
    build = specify_linear(
        cut,
        m,
        rows_per_block,
        dtype=x.dtype,
        bias=None if bias is None else bias.dtype,
        act=act,
        feature_major=feature_major,
    )
    arguments = LaunchArguments(
        find_address(flat), find_address(packed), find_address(bias), find_address(out),
        flat.stride(1), out_stride, layout.meta, layout.columns, rows, cols, tokens, layout.steps,
    )  # fmt: skip
    launch(build, arguments, (ceil(rows / cut.rows), ceil(tokens / cut.tokens)))
    return out


def _check(x: Tensor, packed: Tensor, bias: Tensor | None, layout: Layout) -> None:
    if packed.shape != (layout.size,) or packed.data_ptr() % 16:
        raise KernelError(
            f"the packed weight is not one of {layout.rows} x {layout.cols} to {layout.pattern}"
        )
    check_bias(bias, layout.rows, x.dtype)


def _make_feature_major(flat: Tensor, launch: Launch) -> Tensor:
    """Returns [tokens, cols] with the tokens side by side, lines of them aligned to 16 bytes."""
    aligned = flat.stride(1) % _PIECE == 0 and flat.data_ptr() % 16 == 0
    if flat.stride(0) == 1 and flat.stride(1) >= flat.shape[0] and aligned:
        return flat
    tokens, cols = flat.shape
    line = _pad(tokens)
    turned = torch.empty(cols, line, dtype=flat.dtype, device=flat.device)
    if flat.stride(1) != 1:
        turned[:, :tokens].copy_(flat.t())
        return turned.t()[:tokens]
    arguments = LaunchArguments(
        x=find_address(flat), out=find_address(turned), x_stride=flat.stride(0), out_stride=line,
        cols=cols, tokens=tokens,
    )  # fmt: skip
    grid = ceil(cols / _TURNED), ceil(tokens / _TURNED)
    launch(specify_transpose(flat.dtype), arguments, grid)
    return turned.t()[:tokens]


def _pad(tokens: int) -> int:
    return (tokens + _PIECE - 1) // _PIECE * _PIECE


def _allocate(x: Tensor, rows: int, feature_major: bool) -> tuple[Tensor, int]:
    """Returns the output, [..., rows], and the distance between its lines."""
    lead = x.shape[:-1]
    if not feature_major:
        return x.new_empty(*lead, rows), rows
    tokens = lead.numel()
    line = _pad(tokens)
    turned: Tensor = x.new_empty(rows, line).t()[:tokens].unflatten(0, lead)  # type: ignore[no-untyped-call]
    return turned, line


def _fake(
    x: Tensor,
    packed: Tensor,
    bias: Any,
    rows: int,
    act: str,
    n: int,
    m: int,
    rows_per_block: int,
    tile: Sequence[int],
    feature_major: bool,
) -> Tensor:
    return _allocate(x, rows, feature_major)[0]


vnm_linear_op = register(
    "vnm_linear",
    SCHEMA,
    {"CPU": reference_linear, "CUDA": run_linear},
    fake=_fake,
    reference=reference_linear,
)
