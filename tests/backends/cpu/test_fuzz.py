"""Kernels on random shapes, patterns, strides, threads and dtypes, against masked dense in float64.

    SPARSEDM_FUZZ=100000 pytest -n0 tests/backends/cpu/test_fuzz.py    # so many products
    SPARSEDM_FUZZ=1234: pytest -n0 tests/backends/cpu/test_fuzz.py     # the one of that number

``make fuzz`` runs them under AddressSanitizer and UBSan. The number of a product is all that it is
made from, and what a failure names.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparsedm_compiler.backends.cpu import ops
from sparsedm_compiler.backends.cpu.build import why_unavailable
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.backends.cpu.format import BLOCKS, NARROW, WIDE
from sparsedm_compiler.backends.cpu.isa import ISAS, select_isa
from sparsedm_compiler.patterns import BlockNM, Pattern, SharedNM
from tests.backends.cpu.cases import (
    ACTS,
    DTYPES,
    Norm,
    bias_of,
    case,
    check_conv,
    check_linear,
    check_norm_conv,
)

PARTS = 20
NUMBERS = os.environ.get("SPARSEDM_FUZZ", "2000")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.skipif(why_unavailable() is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_on_random_products_match_float64(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = NUMBERS.endswith(":")
    numbers = [int(NUMBERS[:-1])] * (part == 0) if only else range(part, int(NUMBERS), PARTS)
    for number in numbers:
        check_product(number, monkeypatch)


def check_product(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a weight, packs it, and compares a linear layer or a convolution by it."""
    rng = random.Random(number)
    isa = rng.randrange(1 + ISAS.index(select_isa()))
    monkeypatch.setattr(ops, "_find_isa_code", lambda: isa)
    monkeypatch.setattr(ops, "CACHE_BYTES", rng.choice((0, 1, 30_000, 200_000, 2**40)))
    try:
        check_random_product(rng)
    except Exception as error:
        raise AssertionError(f"product {number}: {error}") from error


def check_random_product(rng: random.Random) -> None:
    """Draws everything that the product depends on, but the instructions of bfloat16."""
    torch.manual_seed(rng.randrange(2**31))
    torch.set_num_threads(rng.choice((1, 1, 2, 3, 5)))
    pattern, dtype = draw_pattern(rng), rng.choice(DTYPES)
    accepted = CpuFamily().require_accepted(pattern)
    wide = draw_layout(rng, pattern, accepted) if dtype == torch.bfloat16 else NARROW
    kernel = () if rng.random() < 0.6 else (rng.randint(1, 4), rng.randint(1, 4))
    taps = kernel[0] * kernel[1] if kernel else 1
    cols = rng.choice((40, 40, 300)) // taps
    groups = rng.randint(1, max(1, cols // pattern.width))
    rows = rng.choice((rng.randint(1, 9), rng.randint(1, 80), rng.randint(1, 600 // taps)))
    width = rng.choice((None, None, rng.randint(1, 200)))
    held = case(str(pattern), groups, rows, dtype, kernel, width=width, wide=wide)
    bias = bias_of(len(held.masked), rng.choice((None, *DTYPES)))
    act, tile = rng.choice(ACTS), rng.randint(1, 13)
    if kernel:
        geometry = [(rng.randint(1, 3), rng.randint(1, 3)) for _ in range(3)]
        geometry[1] = rng.randint(0, 3), rng.randint(0, 3)
        x = draw_images(rng, held.masked.shape[1], kernel, geometry, dtype)
        check_conv(held, x, bias, tuple(geometry), act, tile)
        if x[:, 0].numel() > 1 and not wide:  # of one value torch itself computes no norm
            check_norm_conv(held, x, draw_norm(rng, x), bias, tuple(geometry), act, tile)
    else:
        check_linear(held, draw_tokens(rng, held.masked.shape[1], dtype), bias, act, tile)


def draw_layout(rng: random.Random, pattern: Pattern, accepted: Pattern) -> int:
    """One of the layouts that a weight of the pattern may have in bfloat16."""
    layouts = [NARROW]
    if isinstance(accepted, SharedNM) and accepted.rows % 16 == 0:
        layouts += [WIDE, WIDE]
        if isinstance(pattern, BlockNM) and pattern.columns % 32 == 0:
            layouts += [BLOCKS] * 4
    return rng.choice(layouts)


def draw_pattern(rng: random.Random) -> Pattern:
    """Any kind of pattern that a CPU kernel runs, itself or as one that it implies."""
    m = rng.choice((2, 3, 4, 4, 5, 8, 8, 16, 32, rng.randint(2, 64)))
    n = rng.choice((1, m - 1, rng.randint(1, m - 1)))
    rows = rng.choice((rng.randint(2, 20), 16, 32, 48))
    block = f"1:{rng.randint(2, 4)}@{rows}x{rng.randint(1, 9)}"
    deep = f"{rng.randint(1, 2)}:3@{16 * rng.randint(1, 4)}x{rng.choice((32, 64))}"
    kinds = (
        *(f"{n}:{m}", f"{n}:{m}", deep),
        *(f"{n}:{m}x{rows}", f"{n}:{m}x{rows}"),
        *(block, f"1:2@{rows}x8+2:4"),
        *("2:4t", f"{16 * rng.randint(1, 3)}:2:{rng.choice((8, 16))}"),
    )
    return Pattern.parse(rng.choice(kinds))


def draw_norm(rng: random.Random, x: Tensor) -> Norm:
    """A GroupNorm that fits x [N, channels, H, W]."""
    images, channels = x.shape[:2]
    groups = rng.choice([k for k in range(1, channels + 1) if channels % k == 0])
    offset = rng.choice((None, torch.randn(rng.choice((1, images)), channels, 1, 1)))
    affine = (rng.choice((None, torch.randn(channels).to(x.dtype))) for _ in range(2))
    moved = None if offset is None else offset.to(x.dtype)
    return Norm(groups, moved, *affine, rng.choice(("none", "silu")), rng.choice((1e-6, 1e-2)))


def draw_tokens(rng: random.Random, cols: int, dtype: torch.dtype) -> Tensor:
    """x [..., cols]: by itself, so that a read beyond it is seen, or a view of more."""
    lead = rng.choice(((), (0,), (1,), (rng.randint(1, 5), rng.randint(0, 40)), (300,)))
    lead = rng.choice((lead, (rng.randint(1, 140),)))
    kinds = ("whole", "whole", "slice", "every other", "transposed", "planes", "expanded")
    kind = rng.choice(kinds)
    if kind == "slice":
        return torch.randn(*lead, cols + 7).to(dtype)[..., rng.randint(0, 7) :][..., :cols]
    if kind == "every other":
        return torch.randn(*lead, 2 * cols).to(dtype)[..., ::2]
    if kind == "transposed" and lead:
        return torch.randn(cols, *lead).to(dtype).movedim(0, -1)
    if kind == "planes" and lead:
        return torch.randn(lead[0], cols, *lead[1:]).to(dtype).movedim(1, -1)
    if kind == "expanded" and lead:
        return torch.randn(cols).to(dtype).expand(*lead, cols)
    return torch.randn(*lead, cols).to(dtype)


def draw_images(
    rng: random.Random,
    channels: int,
    kernel: tuple[int, ...],
    geometry: list[tuple[int, int]],
    dtype: torch.dtype,
) -> Tensor:
    """x [N, channels, H, W], at least as large as the dilated kernel without its padding.

    Often a row of the output is whole vectors: the geometry gets a stride of 1 along it then.
    """
    least = [
        max(1, (size - 1) * dilation + 1 - 2 * padding)
        for size, padding, dilation in zip(kernel, geometry[1], geometry[2], strict=True)
    ]
    height, width = (size + rng.randint(0, 12) for size in least)
    if rng.random() < 0.4:
        geometry[0] = geometry[0][0], 1
        width = (kernel[1] - 1) * geometry[2][1] - 2 * geometry[1][1]
        width += rng.choice([out for out in (8, 16, 32) if width + out > 0])
    x = torch.randn(rng.randint(0, 3), channels, height, width).to(dtype)
    kind = rng.choice(("whole", "channels last", "slice", "transposed"))
    if kind == "channels last":
        return x.to(memory_format=torch.channels_last)
    if kind == "slice":
        return torch.cat((x, x), 3)[..., :width]
    return x.transpose(2, 3).contiguous().transpose(2, 3) if kind == "transposed" else x
