"""What else a user could run: torch's own kernel for blocks, and dense fp8 as torch compiles it.

They are timed beside our kernels in the section of single layers, and are never the fastest of a
pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sparsedm_compiler import KernelError
from sparsedm_compiler.backends.custom_op import apply_activation
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask
from sparsedm_compiler.patterns import BlockNM, Pattern

from .plan import Plan

Run = Callable[[], Tensor]
BSR, COMPILED_FP8 = "bsr_dense_addmm", "compiled_fp8"
FP8_AT = "2:4"
"""The pattern at which dense fp8 is shown, beside the 8-bit kernels."""

_LEAST = 16  # what tensor cores multiply
_SETTINGS = ((64, 3, 4), (128, 3, 4), (128, 4, 8))  # tokens of a program, stages, warps
_LARGEST = 448.0


def list_peers(
    x: Tensor, weight: Tensor, bias: Tensor, act: str, pattern: Pattern, plan: Plan
) -> Iterator[tuple[str, Run]]:
    """The calls of the peers that have something to say at a pattern, by name and setting.

    They are timed at the first number of tokens alone, since Inductor takes seconds for each size.
    One that cannot run the sizes raises KernelError when it is called.
    """
    if len(x) != plan.tokens[0]:
        return
    if isinstance(pattern, BlockNM):
        yield from _list_bsr(x, weight, bias, act, pattern)
    if str(pattern) == FP8_AT:
        masked = apply_mask(weight, nm_mask(weight, pattern))
        yield COMPILED_FP8, _compile_fp8(x, masked, bias, act, plan)


def _list_bsr(
    x: Tensor, weight: Tensor, bias: Tensor, act: str, pattern: BlockNM
) -> Iterator[tuple[str, Run]]:
    tokens, rows = len(x), len(weight)
    reason = why_no_bsr(pattern, tokens, x.is_cuda)
    if reason is not None:
        yield BSR, partial(_refuse, reason)
        return
    from torch.sparse._triton_ops import bsr_dense_addmm

    masked = apply_mask(weight, nm_mask(weight, pattern))
    blocks = masked.to_sparse_bsr((pattern.rows, pattern.columns))
    added = bias[:, None].expand(rows, tokens)

    def run(span: int, stages: int, warps: int) -> Tensor:
        out = x.new_empty(tokens, rows)
        setting = {"SPLIT_N": tokens // span, "num_stages": stages, "num_warps": warps}
        meta = {**setting, "GROUP_SIZE_ROW": 4}
        bsr_dense_addmm(added, blocks, x.t(), out=out.t(), meta=meta)
        return apply_activation(out, act)

    for setting in _SETTINGS:
        if tokens % setting[0] == 0:
            yield "/".join((BSR, *map(str, setting))), partial(run, *setting)


def why_no_bsr(pattern: BlockNM, tokens: int, on_cuda: bool) -> str | None:
    """Why torch's kernel cannot run blocks; None if it can."""
    for size in (pattern.rows, pattern.columns):
        if size < _LEAST or size & (size - 1):
            return f"blocks of {pattern.rows} x {pattern.columns} are no powers of two from 16 on"
    if tokens % _SETTINGS[0][0]:
        return f"{tokens} tokens are no multiple of {_SETTINGS[0][0]}"
    return None if on_cuda else "it runs on a GPU alone"


def _refuse(reason: str) -> Tensor:
    raise KernelError(reason)


def _compile_fp8(x: Tensor, weight: Tensor, bias: Tensor, act: str, plan: Plan) -> Run:
    """Dense e4m3 with a scale for every row of both, quantized in torch ops."""
    numbers, scales = _quantize(weight)
    across = scales.t().contiguous()

    def run(x: Tensor, bias: Tensor) -> Tensor:
        rounded, factors = _quantize(x)
        out = torch._scaled_mm(
            *(rounded, numbers.t(), factors, across),
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=x.is_cuda,
        )
        return apply_activation(out, act)

    if plan.compiled:
        run = torch.compile(run, fullgraph=True, dynamic=False)
    return partial(run, x, bias)


def _quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    wide = values.float()
    scales = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / _LARGEST
    rounded = (wide / scales).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return rounded, scales
