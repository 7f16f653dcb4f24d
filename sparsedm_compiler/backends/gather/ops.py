"""Linear layers whose mask S rows share: a dense product over the columns that they keep.

``tile`` is (block_tokens, block_rows, block_k, num_warps, num_stages), the cut of the Triton
kernel: a program computes block_tokens tokens of block_rows rows of one share, block_k kept
columns at a time. The blocks are powers of two, of at least 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from ...errors import KernelError, PackError
from ...patterns import Pattern, SharedNM
from ...triton_support import is_interpreted, on_device_of
from ..custom_op import apply_activation, fake_linear, register

TYPES = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes of values and activations, and of a bias, which may be of another."""

SCHEMA = "str act, int n, int m, int rows_per_mask, int[] tile"
"""The arguments of the op behind ``rows``: the activation, the pattern, and the tile."""

_ALIGN = 16
_LEAST = 16  # of rows and kept columns: what a tensor core multiplies at once
_GROUP = 8
_LONG = ((128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3), (64, 32, 4, 4))


def why_refused(pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
    """Returns why a weight cannot be packed, as a sentence; None if it can.

    >>> why_refused(Pattern.parse("2:4"), 64, 64, torch.float16)
    '2:4 shares no mask among rows'
    """
    if dtype not in TYPES:
        return f"no gather kernel for {str(dtype).removeprefix('torch.')}"
    if pattern.is_dense:
        return f"{pattern} keeps everything"
    if not isinstance(pattern, SharedNM):
        return f"{pattern} shares no mask among rows"
    if pattern.height % _LEAST:
        return f"{pattern.height} rows that share a mask are no multiple of {_LEAST}"
    if cols % pattern.m:
        return f"{cols} columns are not whole groups of {pattern.m}"
    if rows % pattern.height:
        return f"{rows} rows are not whole shares of {pattern.height}"
    if _count_kept(pattern, cols) < _LEAST:
        return f"{_count_kept(pattern, cols)} kept columns are fewer than {_LEAST}"
    return None


def pack(weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Returns the packed form (uint8, 1-D) of ``weight * mask``.

    weight, mask: [rows, cols]; ``mask`` is one of ``pattern``. First the values, [rows / S, kept,
    S] in the dtype of the weight, then their columns, ascending, [rows / S, kept] in int32; each
    from a multiple of 16 bytes. Raises PackError for a weight that cannot be packed, and for a
    mask that is not of the pattern.
    """
    rows, cols = weight.shape
    reason = why_refused(pattern, rows, cols, weight.dtype)
    if reason is not None:
        raise PackError(f"a weight of {list(weight.shape)} cannot be packed to {pattern}: {reason}")
    shares = mask.to(torch.bool).reshape(-1, pattern.height, cols)
    first = shares[:, 0]
    counts = torch.unflatten(first, 1, (-1, pattern.m)).sum(2)
    if bool((shares != shares[:, :1]).any()) or bool((counts != pattern.n).any()):
        raise PackError(f"the mask is not one of {pattern}")
    _, size = _locate_columns(rows, cols, pattern, weight.dtype)
    packed = torch.zeros(size, dtype=torch.uint8, device=weight.device)
    values, columns = view_sections(packed, rows, cols, pattern, weight.dtype)
    where = first.nonzero()[:, 1].view(columns.shape)
    columns.copy_(where)
    blocks = weight.detach().reshape(len(first), pattern.height, cols).transpose(1, 2)
    values.copy_(blocks.gather(1, where.unsqueeze(2).expand_as(values)))
    return packed


def view_sections(
    packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns views of the values [rows / S, kept, S] and columns [rows / S, kept] in ``packed``.

    Raises PackError for bytes that are not those of a weight of that size, pattern and dtype.
    """
    start, end = _locate_columns(rows, cols, pattern, dtype)
    plain = packed.dtype is torch.uint8 and packed.dim() == 1 and packed.is_contiguous()
    if not plain or packed.numel() != end or packed.data_ptr() % _ALIGN:
        raise PackError(
            f"the packed weight is not one of {rows} x {cols} to {pattern} in {dtype}, its bytes "
            f"side by side from a multiple of {_ALIGN}"
        )
    shares, kept = rows // pattern.height, _count_kept(pattern, cols)
    count = shares * kept
    values = packed[: count * pattern.height * dtype.itemsize].view(dtype)
    columns = packed[start : start + 4 * count].view(torch.int32)
    return values.view(shares, kept, pattern.height), columns.view(shares, kept)


def unpack(packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """Returns the masked dense weight [rows, cols], to the bit."""
    values, columns = view_sections(packed, rows, cols, pattern, dtype)
    dense = values.new_zeros(len(values), pattern.height, cols)
    rows_first = values.transpose(1, 2)
    dense.scatter_(2, columns.long().unsqueeze(1).expand_as(rows_first), rows_first)
    return dense.flatten(0, 1)


def check(packed: Tensor, rows: int, cols: int, pattern: Pattern, dtype: torch.dtype) -> None:
    """Raises PackError unless the kernel can run these bytes within their bounds."""
    _, columns = view_sections(packed, rows, cols, pattern, dtype)
    if bool((columns < 0).any()) or bool((columns >= cols).any()):
        raise PackError("the packed weight points outside of its columns")


def list_tiles(pattern: Pattern, dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
    """Returns the few tiles worth measuring on a shape, for long and for short inputs."""
    exact = dtype is torch.float32  # by the ordinary units, not the tensor cores
    rows = min(64 if exact else 128, 1 << (pattern.height - 1).bit_length())
    long = ((64, 32, 4, 3), (128, 32, 8, 3)) if exact else _LONG
    short = (16, 64, 4, 3) if exact else (16, 128, 4, 3)
    return tuple(
        (tokens, rows, k, num_warps, num_stages)
        for tokens, k, num_warps, num_stages in (*long, short)
    )


def reference_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    n: int,
    m: int,
    rows_per_mask: int,
    tile: Sequence[int],
) -> Tensor:
    """Returns the result of ``run_linear``, in plain torch: sums in float32, rounded once."""
    pattern = SharedNM(n, m, rows_per_mask)
    values, columns = view_sections(packed, rows, x.shape[-1], pattern, x.dtype)
    parts = [
        x[..., column].float() @ value.float()
        for column, value in zip(columns.long(), values, strict=True)
    ]
    sums = torch.cat(parts, dim=-1)
    if bias is not None:
        sums = sums + bias.float()
    return apply_activation(sums, act).to(x.dtype)


def run_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    act: str,
    n: int,
    m: int,
    rows_per_mask: int,
    tile: Sequence[int],
) -> Tensor:
    """Returns act(W x + b) by the Triton kernel.

    x: [..., cols] of the packed dtype, of any strides -> [..., rows], contiguous. ``act``: one of
    ACTS. Raises KernelError for a bias that is not one value for each row.
    """
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in TYPES):
        raise KernelError(
            f"a bias of {list(bias.shape)} in {bias.dtype} is not a number for each of {rows} rows"
        )
    flat = x.detach().reshape(-1, x.shape[-1])
    out = x.new_empty(len(flat), rows)
    if out.numel():
        pattern = SharedNM(n, m, rows_per_mask)
        parts = view_sections(packed, rows, x.shape[-1], pattern, x.dtype)
        plain = None if bias is None else bias.detach().contiguous()
        _launch((flat, *parts, plain, out), act, tile)
    return out.view(*x.shape[:-1], rows)


def _launch(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], act: str, tile: Sequence[int]
) -> None:
    """Fills the output, the last of ``tensors``, in the order of the kernel's arguments."""
    from .triton_kernels import gather_kernel

    x, values, _, _, out = tensors
    (tokens, rows), (_, kept, share) = out.shape, values.shape
    block_tokens, block_rows, block_k, num_warps, num_stages = tile
    programs = ceil(tokens / block_tokens) * len(values) * ceil(share / block_rows)
    reach = block_tokens * x.stride(0) + x.shape[1] * x.stride(1)
    with on_device_of(x):
        gather_kernel[(programs,)](
            *tensors,
            *(tokens, rows, kept, *x.stride()),
            EVEN=kept % block_k == 0,
            S=share,
            ACT=act,
            BLOCK_TOKENS=block_tokens,
            BLOCK_ROWS=block_rows,
            BLOCK_K=block_k,
            GROUP=_GROUP,
            WIDE=reach >= 1 << 31,
            UPCAST=is_interpreted(),
            num_warps=num_warps,
            num_stages=num_stages,
        )


def _count_kept(pattern: Pattern, cols: int) -> int:
    """Returns the kept columns of a row."""
    return cols * pattern.n // pattern.m


def _locate_columns(rows: int, cols: int, pattern: Pattern, dtype: torch.dtype) -> tuple[int, int]:
    """Returns where the columns begin and where all ends, in bytes."""
    values = rows * _count_kept(pattern, cols)
    start = ceil(values * dtype.itemsize / _ALIGN) * _ALIGN
    return start, start + ceil(4 * values // pattern.height / _ALIGN) * _ALIGN


gather_linear_op = register(
    "gather_linear",
    SCHEMA,
    {"CPU": reference_linear, "CUDA": run_linear},
    fake=fake_linear,
    reference=reference_linear,
)
