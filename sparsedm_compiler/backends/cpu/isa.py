"""What multiplies bfloat16 by a widely shared mask here, believed only after it has multiplied."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from ...patterns import SharedNM
from .abi import KernelArguments
from .build import library, unavailable
from .pack import pack

ENGINES = ("plain", "dpbf16", "amx")
"""Plain vector code, AVX512-BF16, AMX; their place is their code in wide.h."""


@cache
def engine() -> str:
    """The fastest of ENGINES that this CPU has and that computes a small product exactly."""
    if unavailable() is not None or library().sdm_isa() != b"avx512":
        return "plain"
    if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() and multiplies("amx"):
        return "amx"
    if torch.cpu._is_avx512_bf16_supported() and multiplies("dpbf16"):
        return "dpbf16"
    return "plain"


def multiplies(name: str) -> bool:
    """Whether an engine gives the exact product of a small case, of which every sum is exact."""
    rows, cols, tokens = 64, 160, 33
    mask = (torch.arange(cols, device="cpu") % 4 < 2).expand(rows, cols)
    weight = (
        torch.arange(rows * cols, device="cpu").view(rows, cols) * 37 % 17 - 8
    ).bfloat16() * mask
    x = (torch.arange(tokens * cols, device="cpu").view(tokens, cols) * 29 % 5 - 2).bfloat16()
    packed = pack(weight, mask, SharedNM(2, 4, rows), width=96, wide=True)
    out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cpu")
    call = KernelArguments(
        weight=packed.data_ptr(),
        x=x.data_ptr(),
        out=out.data_ptr(),
        x_type=1,
        tokens=tokens,
        x_stride=cols,
        out_stride=rows,
        tile=3,
        threads=1,
        engine=ENGINES.index(name),
    )
    failed = library().sdm_run(ctypes.byref(call))
    expected = (x.float() @ weight.float().t()).bfloat16()
    return failed == 0 and torch.equal(out, expected)
