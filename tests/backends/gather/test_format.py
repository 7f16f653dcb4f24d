"""Packing loses nothing and refuses what the kernels cannot run."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sparsedm_compiler import PackError, Pattern
from sparsedm_compiler.backends.gather.format import (
    TYPES,
    Layout,
    check,
    choose_layout,
    pack,
    unpack,
    view_sections,
    why_refused,
)
from sparsedm_compiler.masks.nm_mask import nm_mask
from tests.backends.gather.cases import PATTERNS, Case

texts, dtypes = st.sampled_from(PATTERNS), st.sampled_from(TYPES)
seeds = st.integers(0, 2**31)


@examples(max_examples=100, deadline=None, derandomize=True)
@given(texts, st.integers(1, 3), st.integers(1, 40), dtypes, seeds)
def test_unpack_inverts_pack(  # type: ignore[no-untyped-def]
    text, shares, groups, dtype, seed
) -> None:
    torch.manual_seed(seed)
    case = Case(text, shares, groups, dtype)
    found = unpack(case.packed, case.rows, case.cols, case.pattern, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), case.masked.view(torch.uint8))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_pack_stores_values_and_ascending_columns_once(dtype: torch.dtype) -> None:
    """Values by share, kept column and row, then the ascending columns: nothing is stored twice."""
    case = Case("2:8x48", 2, 11, dtype)
    values, columns = view_sections(case.packed, case.rows, case.cols, case.pattern, dtype)
    assert case.packed.numel() == case.rows * 22 * dtype.itemsize + 2 * 22 * 4
    assert columns.dtype == torch.int32
    assert (columns.diff() > 0).all()
    for share, (value, column) in enumerate(zip(values, columns, strict=True)):
        rows = case.masked[48 * share : 48 * (share + 1)]
        assert torch.equal(rows[:, column.long()], value.t())
    for part in (values, columns):
        assert part.untyped_storage().data_ptr() == case.packed.untyped_storage().data_ptr()
        assert part.data_ptr() % 16 == 0


def test_pack_aligns_sections_to_16_bytes() -> None:
    case = Case("17:19x16", 1, 1, torch.float16)
    assert case.packed.numel() == 16 * 17 * 2 + 80
    _, columns = view_sections(case.packed, 16, 19, case.pattern, torch.float16)
    assert columns.data_ptr() - case.packed.data_ptr() == 16 * 17 * 2


def test_pack_keeps_signed_zeros_nan_and_denormals() -> None:
    weight = torch.tensor([-0.0, 1e-45, torch.nan, 0.0]).repeat(16, 16)
    mask = (torch.arange(64) % 4 != 3).expand(16, 64)
    pattern = Pattern.parse("3:4x16")
    found = unpack(pack(weight, mask, pattern), 16, 64, pattern, torch.float32)
    assert torch.equal(found.view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize(
    ("text", "rows", "cols", "dtype", "why"),
    [
        ("1:8x16", 64, 256, torch.float64, "no gather kernel for float64"),
        ("4:4x16", 64, 256, torch.float32, "4:4x16 keeps everything"),
        ("2:4", 64, 256, torch.float16, "2:4 shares no mask among rows"),
        ("64:2:8", 64, 256, torch.float16, "64:2:8 shares no mask among rows"),
        ("2:4x24", 48, 256, torch.float16, "24 rows that share a mask are no multiple of 16"),
        ("2:4x16", 64, 258, torch.float16, "258 columns are not whole groups of 4"),
        ("2:4x32", 80, 256, torch.float16, "80 rows are not whole shares of 32"),
        ("1:8x16", 64, 120, torch.bfloat16, "15 kept columns are fewer than 16"),
        ("1:8x16", 64, 128, torch.bfloat16, None),
        ("2:2@32x8", 64, 128, torch.bfloat16, "2:2@32x8 keeps everything"),
        ("2:2@32x8+2:4", 64, 128, torch.bfloat16, "2:2@32x8+2:4 keeps everything"),
        ("1:2@24x8", 48, 128, torch.float16, "24 rows that share a mask are no multiple of 16"),
        ("1:2@32x48", 64, 144, torch.float16, "144 columns are not whole groups of 96"),
        ("1:2@32x16", 64, 32, torch.float16, None),
    ],
)
def test_why_refused_names_the_reason(
    text: str, rows: int, cols: int, dtype: torch.dtype, why: str | None
) -> None:
    assert why_refused(Pattern.parse(text), rows, cols, dtype) == why
    if why is not None:
        weight = torch.zeros(rows, cols, dtype=dtype)
        with pytest.raises(PackError, match=re.escape(f"packed to {text}: {why}")):
            pack(weight, weight.bool(), Pattern.parse(text))


def test_pack_with_a_mask_of_another_pattern_raises() -> None:
    pattern, weight = Pattern.parse("2:4x16"), torch.randn(32, 64)
    mask = nm_mask(weight, pattern)
    unshared, unequal = mask.clone(), mask.clone()
    unshared[5] = ~unshared[5]
    unequal[:16, 0] = ~unequal[:16, 0]
    for wrong in (unshared, unequal):
        with pytest.raises(PackError, match="the mask is not one of 2:4x16"):
            pack(weight, wrong, pattern)


def test_pack_with_a_mask_that_cuts_blocks_raises() -> None:
    pattern, weight = Pattern.parse("1:2@16x8"), torch.randn(32, 64)
    mask = nm_mask(weight, pattern)
    holed, two, none = mask.clone(), mask.clone(), mask.clone()
    holed[0, int(mask[0].nonzero()[0])] = False
    two[:16, :16] = True
    none[16:, :16] = False
    for wrong in (holed, two, none):
        with pytest.raises(PackError, match="the mask is not one of 1:2@16x8"):
            pack(weight, wrong, pattern)


def test_pack_of_nested_blocks_stores_zeros_where_the_inner_pattern_prunes() -> None:
    torch.manual_seed(0)
    pattern, weight = Pattern.parse("1:2@16x16+1:8"), torch.randn(32, 64)
    mask = nm_mask(weight, pattern)
    packed = pack(weight, mask, pattern)
    values, _ = view_sections(packed, 32, 64, pattern, torch.float32)
    assert values.shape == (2, 32, 16)
    assert (values != 0).sum() == mask.sum()
    assert torch.equal(unpack(packed, 32, 64, pattern, torch.float32), torch.where(mask, weight, 0))
    with pytest.raises(PackError, match="the mask is not one of"):
        pack(weight, torch.ones_like(mask), pattern)


@pytest.mark.parametrize(
    ("text", "run"),
    [("1:2@16x2", 1), ("1:2@16x12", 1), ("1:2@16x24", 8), ("1:4@16x16", 16), ("1:2@16x128", 64)],
)
def test_choose_layout_runs_are_powers_of_two_that_blocks_hold_whole(text: str, run: int) -> None:
    layout = choose_layout(Pattern.parse(text))
    assert layout is not None
    assert layout.run == run
    assert layout.step % run == 0
    assert choose_layout(Pattern.parse("1:4x16")) == Layout(16, 1, 4)
    assert choose_layout(Pattern.parse("2:4")) is None


def test_check_refuses_columns_outside_and_runs_that_are_none() -> None:
    case = Case("1:2@16x16", 2, 8, torch.float16)

    about = case.rows, case.cols, case.pattern, torch.float16
    check(case.packed, *about)
    for where, by, message in (
        (slice(-1, None), 1000, "points outside of its columns"),
        (slice(0, 1), -1000, "points outside of its columns"),
        (slice(1, 2), 1, "no blocks of 1:2@16x16"),
        (slice(0, 16), 8 if int(case.masked[16, 0] != 0) else -8, "no blocks of 1:2@16x16"),
    ):
        packed = case.packed.clone()
        _, columns = view_sections(packed, case.rows, case.cols, case.pattern, torch.float16)
        columns[1, where] += by
        with pytest.raises(PackError, match=message):
            check(packed, *about)


def test_view_sections_of_another_size_raises() -> None:
    case = Case("2:4x16", 2, 16, torch.float16)
    for packed, rows, dtype in (
        (case.packed, 48, torch.float16),
        (case.packed, 32, torch.float32),
        (case.packed[:-1], 32, torch.float16),
        (case.packed.view(torch.int8), 32, torch.float16),
        (torch.cat([case.packed[:1], case.packed])[1:], 32, torch.float16),
    ):
        with pytest.raises(PackError, match=f"not one of {rows} x 64 to 2:4x16"):
            view_sections(packed, rows, 64, case.pattern, dtype)
