"""Lays tokens out as the rows of one matrix, padded to a multiple that a kernel takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGN = 16
"""Bytes to which cuSPARSELt and the kernels' vector loads want their operands aligned."""


def apply_to_tokens(x: Tensor, rows: int, multiple: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns ``run`` of x [..., cols] as one contiguous matrix [tokens, cols]: [..., rows].

    The tokens that ``run`` sees are a multiple of ``multiple``, zeros behind the last; it gives
    [tokens, rows]. There is a copy only where x has gaps, lies odd in memory or is padded. With no
    tokens at all it is not called.
    """
    flat = x.reshape(-1, x.shape[-1])
    tokens = flat.shape[0]
    if not tokens:
        return x.new_empty(*x.shape[:-1], rows)
    missing = -tokens % multiple
    out = run(align(F.pad(flat, (0, 0, 0, missing)) if missing else flat))
    return out[:tokens].view(*x.shape[:-1], rows)


def align(x: Tensor) -> Tensor:
    """Returns x contiguous and at an address that vector loads take; x itself where it is so."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGN == 0 else x.clone(memory_format=torch.contiguous_format)
