"""Ends products whose bare sums lie in memory: parts are added, scaled, biased and activated."""

from __future__ import annotations

from math import ceil

from torch import Tensor

from ...triton_support import on_device_of
from ..custom_op import apply_activation

Scales = tuple[Tensor, Tensor]
"""Of the tokens and of the rows, float32: a sum is multiplied by both."""

_TOKENS, _ROWS = 4, 512  # of a program


def finish_sums(
    sums: Tensor, scales: Scales | None, bias: Tensor | None, act: str, out: Tensor
) -> None:
    """Fills ``out``, by one Triton kernel.

    Args:
        sums: The sums of products, [parts, tokens, rows], or [tokens or more, rows], of any dtype.
        scales: As Scales; None for none.
        bias: One value for each row.
        act: One of ``custom_op.ACTS``.
        out: [tokens, rows], contiguous.
    """
    from .triton_kernels import finish_kernel

    tokens, rows = out.shape
    x_scales, w_scales = (None, None) if scales is None else scales
    grid = ceil(tokens / _TOKENS), ceil(rows / _ROWS)
    with on_device_of(out):
        finish_kernel[grid](
            *(sums, x_scales, w_scales, bias, out, tokens, rows),
            SPLITS=len(sums) if sums.dim() == 3 else 1,
            ACT=act,
            BLOCK_TOKENS=_TOKENS,
            BLOCK_ROWS=_ROWS,
            num_warps=4,
        )


def reference_finish(
    sums: Tensor, scales: Scales | None, bias: Tensor | None, act: str, out: Tensor
) -> None:
    """Fills ``out`` as ``finish_sums`` does, in plain torch: in float32, rounded once."""
    wide = sums.float()
    total = wide.sum(0) if sums.dim() == 3 else wide[: len(out)]
    if scales is not None:
        total = total * (scales[0][: len(out), None] * scales[1])
    out.copy_(apply_activation(total if bias is None else total + bias.float(), act))
