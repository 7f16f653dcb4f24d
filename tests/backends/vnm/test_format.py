"""The packed V:n:m format: to the bit and back, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compiler import PackError, Pattern
from sparsedm_compiler.backends.vnm.format import Layout, check, pack, unpack, why_refused
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask
from tests.backends.vnm.vnm_cases import HALVES, PATTERNS


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from(HALVES),
    st.integers(0, 2**31),
    st.floats(0, 1),
)
def test_unpack_inverts_pack(
    text: str, blocks: int, groups: int, dtype: torch.dtype, seed: int, lost: float
) -> None:
    """For the masks of a pattern, and for any part of one."""
    pattern = Pattern.parse(text)
    torch.manual_seed(seed)
    shape = (blocks * pattern.height, 8 * groups * pattern.m // (8 if pattern.m % 8 == 0 else 1))
    weight = torch.randn(shape).to(dtype)
    mask = nm_mask(weight, pattern) & (torch.rand(shape) >= lost)
    packed = pack(weight, mask, pattern)
    assert packed.shape == (Layout(*shape, pattern).size,)
    check(packed, *shape, pattern, dtype)
    found = unpack(packed, *shape, pattern, dtype)
    assert torch.equal(found.view(torch.int16), apply_mask(weight, mask).view(torch.int16))


def test_pack_takes_little_memory() -> None:
    weight = torch.randn(1536, 512).bfloat16()
    for text, share in (("64:2:8", 0.29), ("64:2:16", 0.15)):
        packed = pack(weight, nm_mask(weight, text), Pattern.parse(text))
        assert packed.nbytes < share * weight.nbytes


@pytest.mark.parametrize(
    ("text", "rows", "cols", "dtype", "said"),
    [
        ("2:4", 64, 64, torch.bfloat16, "2:4 is not V:n:m"),
        ("1:8x16", 64, 64, torch.bfloat16, "is not V:n:m"),
        ("64:3:8", 64, 64, torch.bfloat16, "keeps 3 of 4 columns, sparse tensor cores multiply 2"),
        ("64:2:8", 64, 64, torch.float32, "no V:n:m kernel for float32"),
        ("8:2:8", 64, 64, torch.bfloat16, "8 rows that share columns are not a multiple of 16"),
        ("64:2:64", 64, 64, torch.bfloat16, "wider than the 32 columns"),
        ("64:2:8", 96, 64, torch.bfloat16, "output width 96 is not a multiple of the 64"),
        ("64:2:8", 64, 68, torch.bfloat16, "input width 68 is not a multiple of 8"),
        ("16:2:10", 64, 20, torch.bfloat16, "20 columns are not a multiple of 8"),
        ("64:2:8", 64, 64, torch.bfloat16, None),
    ],
)
def test_why_refused_names_the_reason(
    text: str, rows: int, cols: int, dtype: torch.dtype, said: str | None
) -> None:
    pattern = Pattern.parse(text)
    found = why_refused(pattern, rows, cols, dtype)
    if said is None:
        assert found is None
        return
    assert found is not None
    assert said in found
    weight = torch.zeros(rows, cols, dtype=dtype)
    with pytest.raises(PackError, match="cannot be packed"):
        pack(weight, weight.bool(), pattern)


def test_pack_with_a_mask_of_another_pattern_raises() -> None:
    weight = torch.randn(64, 64).bfloat16()
    with pytest.raises(PackError, match="keeps more than 4 columns"):
        pack(weight, nm_mask(weight, "2:8"), Pattern.parse("64:2:8"))
    full = torch.zeros(64, 64, dtype=torch.bool)
    full[:, :3] = True
    with pytest.raises(PackError, match="keeps more than 2 columns"):
        pack(weight, full, Pattern.parse("64:2:8"))


def test_unpack_of_other_bytes_raises() -> None:
    pattern = Pattern.parse("64:2:8")
    for packed in (torch.zeros(100, dtype=torch.uint8), torch.zeros(2368, dtype=torch.int8)):
        with pytest.raises(PackError, match="which takes 2368 bytes"):
            unpack(packed, 64, 64, pattern, torch.bfloat16)


def test_check_of_damaged_bytes_raises() -> None:
    pattern, weight = Pattern.parse("64:2:8"), torch.randn(64, 128).bfloat16()
    layout = Layout(64, 128, pattern)
    packed = pack(weight, nm_mask(weight, pattern), pattern)
    check(packed, 64, 128, pattern, weight.dtype)
    for place in (layout.meta, layout.columns + 1, layout.columns + 8):
        damaged = packed.clone()
        damaged[place : place + 1] = 0
        if place == layout.columns + 1:
            damaged[place] = 1
        with pytest.raises(PackError, match="points outside"):
            check(damaged, 64, 128, pattern, weight.dtype)
