"""Per-row 2:4 weights on NVIDIA's sparse tensor cores, by cuSPARSELt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import PackError
from ...patterns import NM, VNM, BlockNM, NestedNM, Pattern, SharedNM, TransposableNM
from ..cuda.device import (
    find_device,
    list_cusparselt,
    note_cusparselt,
    why_no_cusparselt,
    why_no_tensor_cores,
)
from ..cuda.family import CudaFamily
from ..kernel_family import KernelConfig, KernelFamily, MatmulProblem, OpCall, WeightFormat
from ..weight_matrix import from_matrix, to_matrix
from .algorithms import find_algorithms
from .format import GROUP, KEPT, pack24, read_header, why_not_2to4
from .ops import DEFAULT, TOKENS, CuSparseLtSetting, semi_conv2d, semi_linear, to_dense
from .training import semi_train_op

TYPES = (torch.float16, torch.bfloat16)
KINDS = (NM, SharedNM, VNM, TransposableNM, BlockNM, NestedNM)
"""The kinds of pattern that may keep at most 2 of every 4 columns."""
_MULTIPLE = 16


class CuSparseLtFamily(CudaFamily):
    """Kernels for masks of at most 2 in every aligned 4 columns, in float16 and bfloat16.

    Layout of a KernelConfig: (). Tile: as CuSparseLtSetting, an algorithm of the library with its
    split of K. A packed weight is what ``torch._cslt_compress`` gives; on the CPU, as ``pack24``
    gives it. NaN and Inf cannot come up in a weight (masks refuse them); in the input they spread
    over the outputs that multiply them, not over those whose weight was pruned, as they would in
    dense.
    """

    names: tuple[str, ...] = ("cuda_semi",)
    accepts = KINDS
    opaque = True
    token_multiple = TOKENS
    token_ops = (semi_linear,)
    training_op = semi_train_op

    def why_unavailable(self) -> str | None:
        device = find_device()
        return why_no_tensor_cores(device) or why_no_cusparselt(device)

    def describe_doubts(self) -> str | None:
        return note_cusparselt(find_device())

    def list_libraries(self) -> dict[str, str | None]:
        return list_cusparselt()

    def describe_backward(self, pattern: Pattern, *, frozen: bool) -> str:
        if isinstance(pattern, TransposableNM):
            return ""
        return "the gradient of x is dense, '2:4t' makes it sparse"

    def _refuse(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        if dtype not in TYPES:
            plain = str(dtype).removeprefix("torch.")
            return f"no 2:4 kernel for {plain}: sparse tensor cores take float16 and bfloat16"
        return why_misfit(pattern, rows, cols, _MULTIPLE)

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        """Returns the algorithms that run here; only running one tells which sizes it takes."""
        _, *split = DEFAULT
        return tuple(
            KernelConfig(self.names[0], (), (algorithm, *split))
            for algorithm in find_algorithms(dtype)
        )

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        values, mask = check_matrices(weight, mask, pattern, self)
        return torch._cslt_compress(values) if values.is_cuda else pack24(values, mask)

    def unpack(self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat) -> Tensor:
        return from_matrix(to_dense(packed, shape[0], math.prod(shape[1:])), shape[2:])

    def check(
        self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat
    ) -> torch.dtype:
        dtype, rows, cols = read_header(packed)
        if (rows, rows * cols) != (shape[0], math.prod(shape)):
            raise PackError(f"it is packed as {rows} x {cols}, not {shape}")
        return dtype

    def to_portable(
        self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat
    ) -> Tensor:
        if not packed.is_cuda:
            return packed
        dense = to_matrix(self.unpack(packed, shape, weight_format))
        return pack24(dense, dense != 0)

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        setting = CuSparseLtSetting(*tile)._asdict()
        return problem.choose_op(semi_linear, semi_conv2d, act=problem.act, **setting)


def check_matrices(
    weight: Tensor, mask: Tensor, pattern: Pattern, family: KernelFamily
) -> tuple[Tensor, Tensor]:
    """Returns (weight, mask) as matrices. Raises PackError where the family cannot pack them."""
    values, mask = to_matrix(weight.detach()), to_matrix(mask)
    rows, cols = values.shape
    reason = family.why_refused(pattern, rows, cols, values.dtype) or why_not_2to4(mask)
    if reason is not None:
        raise PackError(f"a weight of {list(weight.shape)} cannot be packed to 2:4: {reason}")
    return values, mask


def why_misfit(pattern: Pattern, rows: int, cols: int, multiple: int) -> str | None:
    """Returns why sparse tensor cores cannot run such a weight, as a sentence; None if they can."""
    most = pattern.most_kept(GROUP)
    if most > KEPT:
        return (
            f"{pattern} keeps up to {most} of {GROUP} columns, which sparse tensor cores cannot "
            f"run: they take {KEPT}"
        )
    for size, dimension in ((rows, "rows"), (cols, "columns")):
        if size % multiple:
            return f"{size} {dimension} are not a multiple of {multiple}, as cuSPARSELt wants"
    return None
