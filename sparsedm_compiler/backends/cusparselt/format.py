"""The portable 2:4 format: two values of every four columns, and a two-bit index for each.

Files hold it, and a CPU runs it; cuSPARSELt's own layout is for one kind of device only.
"""

from __future__ import annotations

import struct
from typing import Final

import torch
from torch import Tensor

from ...errors import PackError

TYPES: Final = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
"""Dtypes of the values; their index is their code in the header."""
GROUP, KEPT = 4, 2
_HEADER: Final = struct.Struct("<4i")
_MAGIC: Final = 0x3432534E
_BITS: Final = {1: torch.uint8, 2: torch.int16}


def why_not_2to4(mask: Tensor) -> str | None:
    """Returns why a mask [rows, cols] is not 2:4, as a sentence; None if it is.

    ``torch._cslt_compress`` would drop further values without a word.
    """
    if mask.shape[1] % GROUP:
        return f"{mask.shape[1]} columns are not whole groups of {GROUP}"
    most = int(torch.unflatten(mask, 1, (-1, GROUP)).sum(2).max()) if mask.numel() else 0
    if most > KEPT:
        return f"its mask keeps {most} of {GROUP} columns, sparse tensor cores take {KEPT}"
    return None


def pack24(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the packed form (uint8, 1-D, on the CPU) of a matrix.

    values: [rows, cols] of one of TYPES, zero where the mask is False; all kept ones are stored as
    they are, negative zeros too. Raises PackError for other dtypes, odd sizes, and masks that are
    not 2:4.
    """
    values, mask = values.cpu(), mask.cpu()
    rows, cols = values.shape
    if values.dtype not in TYPES:
        raise PackError(f"2:4 weights are {', '.join(map(_name_dtype, TYPES))}, not {values.dtype}")
    if cols % 8 or (reason := why_not_2to4(mask)) is not None:
        reason = f"{cols} columns are not a multiple of 8" if cols % 8 else reason
        raise PackError(f"a weight of {rows} x {cols} cannot be packed to 2:4: {reason}")
    # A stable sort of "is pruned" brings the kept columns of a group to its front, in order.
    pruned = torch.unflatten(mask.logical_not(), 1, (-1, GROUP)).to(torch.uint8)
    indices = pruned.sort(dim=2, stable=True).indices[..., :KEPT]
    bits = torch.unflatten(values.view(_BITS[values.itemsize]), 1, (-1, GROUP))
    chosen = bits.gather(2, indices).contiguous()
    # Four indices of two bits to a byte, those of the first group in its low half.
    four = indices.to(torch.uint8).reshape(rows, -1, 2 * KEPT)
    meta = four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6
    header = bytearray(_HEADER.pack(_MAGIC, TYPES.index(values.dtype), rows, cols))
    start = torch.frombuffer(header, dtype=torch.uint8)
    return torch.cat((start, chosen.view(torch.uint8).flatten(), meta.flatten()))


def unpack24(packed: Tensor) -> Tensor:
    """Returns the dense matrix [rows, cols], to the bit. Raises PackError for other bytes."""
    dtype, rows, cols = read_header(packed)
    size = rows * cols // 2 * dtype.itemsize
    packed = packed[_HEADER.size :].clone()  # to begin where numbers of any size may
    kind = _BITS[dtype.itemsize]
    chosen = packed[:size].view(kind).view(rows, -1, KEPT)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    indices = (packed[size:, None] >> shifts & 3).view(rows, -1, KEPT)
    dense = torch.zeros(rows, cols // GROUP, GROUP, dtype=kind, device=packed.device)
    return dense.scatter_(2, indices.long(), chosen).flatten(1).view(dtype)


def read_header(packed: Tensor) -> tuple[torch.dtype, int, int]:
    """Returns (dtype, rows, cols) of a packed weight. Raises PackError for bytes that are none."""
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or packed.numel() < _HEADER.size:
        raise PackError(f"a tensor {tuple(packed.shape)} of {packed.dtype} is no 2:4 weight")
    magic, code, rows, cols = _HEADER.unpack(bytes(packed[: _HEADER.size].tolist()))
    if magic != _MAGIC or code not in range(len(TYPES)) or min(rows, cols) < 1 or cols % 8:
        raise PackError("the bytes do not begin as a 2:4 weight does")
    values = rows * cols // 2 * TYPES[code].itemsize
    if packed.numel() != _HEADER.size + values + rows * cols // 8:
        raise PackError("the 2:4 weight is cut short or was written by another version")
    return TYPES[code], rows, cols


def _name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
