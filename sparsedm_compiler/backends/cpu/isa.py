"""The vectors of this CPU, and its bfloat16 instructions for widely shared masks and blocks.

Those, AMX or AVX512-BF16, are used only once they have computed a small exact product here.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from ...patterns import SharedNM
from .abi import KernelArguments
from .build import load_library, why_unavailable
from .format import BLOCKS, WIDE
from .pack import pack

ISAS = ("plain", "dpbf16", "amx")
"""Plain vector code, AVX512-BF16, AMX; their index is their code in wide.h."""


@cache
def read_isa() -> str:
    """Returns the vectors that the kernels use: avx512, avx2, neon, or portable for any others."""
    if why_unavailable() is not None:
        return "portable"
    name: bytes = load_library().sdm_isa()
    return name.decode()


@cache
def select_isa() -> str:
    """Returns the fastest of ISAS that this CPU has and that computes a small product exactly."""
    if read_isa() != "avx512":
        return "plain"
    if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() and multiplies_exactly("amx"):
        return "amx"
    if torch.cpu._is_avx512_bf16_supported() and multiplies_exactly("dpbf16"):
        return "dpbf16"
    return "plain"


@cache
def multiplies_blocks() -> bool:
    """Returns whether the kernel of blocks computes a small product exactly by ``select_isa``."""
    return multiplies_exactly(select_isa(), BLOCKS)


def multiplies_exactly(isa: str, wide: int = WIDE) -> bool:
    """Returns whether one of ISAS gives the product of a small case whose sums are all exact.

    ``wide``: the layout of the weight.
    """
    rows, cols, tokens = 64, 192, 77
    n, m, width = (2, 4, 96) if wide == WIDE else (32, 64, cols)
    mask = (torch.arange(cols, device="cpu") % m < n).expand(rows, cols)
    weight = (
        torch.arange(rows * cols, device="cpu").view(rows, cols) * 37 % 17 - 8
    ).bfloat16() * mask
    x = (torch.arange(tokens * cols, device="cpu").view(tokens, cols) * 29 % 5 - 2).bfloat16()
    packed = pack(weight, mask, SharedNM(n, m, rows), width=width, wide=wide)
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
        isa=ISAS.index(isa),
    )
    failed = load_library().sdm_run(ctypes.byref(call))
    expected = (x.float() @ weight.float().t()).bfloat16()
    return failed == 0 and torch.equal(out, expected)
