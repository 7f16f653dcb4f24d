"""V:n:m weights on sparse tensor cores: act(x W^T + b) by vnm.cu, and its reference in torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ...patterns import VNM, Pattern
from ..custom_op import activate, register
from .format import Layout, unpack
from .launch import Launch, Problem, Tile, address, linear_build, on_device, turn_build

_PIECE = 8  # values of 16 bytes


class How(NamedTuple):
    """The numbers in ``how``: the pattern, the tile, and whether out lies feature-major."""

    n: int
    m: int
    share: int
    warp_tokens: int
    down: int
    across: int
    stages: int
    feature_major: int = 0

    @property
    def pattern(self) -> Pattern:
        return VNM(self.n, self.m, self.share)

    @property
    def tile(self) -> Tile:
        return Tile(warp_rows(self.share), *self[3:7])


def warp_rows(share: int) -> int:
    """Rows of a warp: all of them share their columns."""
    return next(rows for rows in (64, 32, 16) if share % rows == 0)


def reference_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, act: str, how: Sequence[int]
) -> Tensor:
    """What the kernel computes: sums, bias and activation in float32, rounded once."""
    pattern, cols = How(*how).pattern, x.shape[-1]
    weight = unpack(packed, rows, cols, pattern, x.dtype).float()
    out = F.linear(x.float(), weight, None if bias is None else bias.float())
    return _laid_out(activate(out, act).to(x.dtype), How(*how))


def run_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    how: Sequence[int],
    launch: Launch | None = None,
) -> Tensor:
    """x: [..., cols] in half precision -> [..., rows], by the kernel."""
    given, cols = How(*how), x.shape[-1]
    layout = Layout(rows, cols, given.pattern)
    _check(x, packed, bias, layout)
    launch = launch or on_device(x.device)
    flat = x.reshape(-1, cols)
    tokens = flat.shape[0]
    out, lines = _empty(x, rows, given)
    if tokens == 0:
        return out
    flat = _feature_major(flat, launch)
    bias = None if bias is None else bias.contiguous()
    build = linear_build(
        given.tile,
        given.m,
        given.share,
        dtype=x.dtype,
        bias=None if bias is None else bias.dtype,
        act=act,
        feature_major=bool(given.feature_major),
    )
    problem = Problem(
        address(flat), address(packed), address(bias), address(out), flat.stride(1), lines,
        layout.meta, layout.columns, rows, cols, tokens, layout.steps,
    )  # fmt: skip
    tile = given.tile
    launch(build, problem, (ceil(rows / tile.rows), ceil(tokens / tile.tokens)))
    return out


def _check(x: Tensor, packed: Tensor, bias: Tensor | None, layout: Layout) -> None:
    if packed.shape != (layout.size,) or packed.data_ptr() % 16:
        raise KernelError(
            f"the packed weight is not one of {layout.rows} x {layout.cols} to {layout.pattern}"
        )
    if bias is not None and (bias.shape != (layout.rows,) or bias.dtype not in (x.dtype, _WIDE)):
        raise KernelError(
            f"a bias of {list(bias.shape)} in {bias.dtype} is not one value for each of "
            f"{layout.rows} rows in {x.dtype} or float32"
        )


_WIDE = torch.float32


def _feature_major(flat: Tensor, launch: Launch) -> Tensor:
    """[tokens, cols] with the tokens side by side, lines of them 16 bytes aligned."""
    aligned = flat.stride(1) % _PIECE == 0 and flat.data_ptr() % 16 == 0
    if flat.stride(0) == 1 and flat.stride(1) >= flat.shape[0] and aligned:
        return flat
    tokens, cols = flat.shape
    line = _padded(tokens)
    turned = torch.empty(cols, line, dtype=flat.dtype, device=flat.device)
    if flat.stride(1) != 1:
        turned[:, :tokens].copy_(flat.t())
        return turned.t()[:tokens]
    problem = Problem(
        x=address(flat), out=address(turned), x_stride=flat.stride(0), out_stride=line,
        cols=cols, tokens=tokens,
    )  # fmt: skip
    launch(turn_build(flat.dtype), problem, (ceil(cols / 64), ceil(tokens / 64)))
    return turned.t()[:tokens]


def _padded(tokens: int) -> int:
    return (tokens + _PIECE - 1) // _PIECE * _PIECE


def _empty(x: Tensor, rows: int, how: How) -> tuple[Tensor, int]:
    """The output, [..., rows], and how far apart its lines are."""
    lead = x.shape[:-1]
    if not how.feature_major:
        return x.new_empty(*lead, rows), rows
    tokens = lead.numel()
    line = _padded(tokens)
    turned: Tensor = x.new_empty(rows, line).t()[:tokens].unflatten(0, lead)  # type: ignore[no-untyped-call]
    return turned, line


def _laid_out(out: Tensor, how: How) -> Tensor:
    """The same values with the strides that the kernel would give them."""
    if not how.feature_major:
        return out
    return _empty(out, out.shape[-1], how)[0].copy_(out)


def _fake(x: Tensor, packed: Tensor, bias: Any, rows: int, act: str, how: Sequence[int]) -> Tensor:
    return _empty(x, rows, How(*how))[0]


vnm_linear_op = register(
    "vnm_linear",
    "str act, int[] how",
    {"CPU": reference_linear, "CUDA": run_linear},
    fake=_fake,
    reference=reference_linear,
)
