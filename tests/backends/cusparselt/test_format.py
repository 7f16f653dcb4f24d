"""The portable 2:4 format gives back every bit, and refuses everything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsedm_compiler import PackError
from sparsedm_compiler.backends.cusparselt.format import (
    TYPES,
    pack24,
    read_header,
    unpack24,
    why_not_2to4,
)
from sparsedm_compiler.masks.nm_mask import nm_mask
from tests.oracle import assert_same


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@given(
    dtype=st.sampled_from(TYPES),
    rows=st.integers(1, 5),
    groups=st.integers(1, 5),
    pattern=st.sampled_from(["2:4", "1:4", "1:8", "2:8", "1:2"]),
    seed=st.integers(0, 99),
)
def test_every_bit_comes_back(
    dtype: torch.dtype, rows: int, groups: int, pattern: str, seed: int
) -> None:
    torch.manual_seed(seed)
    mask = nm_mask(torch.randn(rows, 8 * groups), pattern)
    raw = torch.randint(0, 256, (rows, 8 * groups * dtype.itemsize), dtype=torch.uint8)
    values = torch.where(mask.repeat_interleave(dtype.itemsize, 1), raw, 0).view(dtype)
    packed = pack24(values, mask)
    assert read_header(packed) == (dtype, rows, 8 * groups)
    assert_same(bits(unpack24(packed)), bits(values))
    moved = torch.cat((packed[:1], packed))[1:]  # numbers that begin at an odd address
    assert_same(bits(unpack24(moved)), bits(values))


def test_it_takes_nine_sixteenths_of_the_memory() -> None:
    weight = torch.randn(64, 64)
    packed = pack24(weight.where(nm_mask(weight, "2:4"), 0).bfloat16(), nm_mask(weight, "2:4"))
    assert packed.numel() == 64 * 64 * 2 * 9 // 16 + 16


def test_a_third_value_is_not_dropped_but_refused() -> None:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[1, 4:7] = True
    assert why_not_2to4(mask) == "its mask keeps 3 of 4 columns, sparse tensor cores take 2"
    with pytest.raises(PackError, match=r"2 x 8 cannot be packed to 2:4: its mask keeps 3 of 4"):
        pack24(mask.bfloat16(), mask)
    assert why_not_2to4(mask[:, :6]) == "6 columns are not whole groups of 4"
    with pytest.raises(PackError, match="4 columns are not a multiple of 8"):
        pack24(mask[:, :4].bfloat16(), mask[:, :4])
    with pytest.raises(PackError, match=r"not torch\.float32"):
        pack24(mask.float(), mask)


def test_bytes_that_are_no_weight_are_refused() -> None:
    mask = nm_mask(torch.randn(4, 8), "2:4")
    packed = pack24(mask.half(), mask)
    for change, said in (
        (0, "do not begin"),
        (4, "do not begin"),
        (8, "cut short"),
        (12, "do not"),
    ):
        broken = packed.clone()
        broken[change] += 9
        with pytest.raises(PackError, match=said):
            unpack24(broken)
    with pytest.raises(PackError, match="cut short"):
        unpack24(packed[:-1])
    for odd in (packed[:8], packed.view(1, -1), packed.char()):
        with pytest.raises(PackError, match="is no 2:4 weight"):
            unpack24(odd)
