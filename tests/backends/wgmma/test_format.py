"""The packed format of wgmma.cu: round trips, what its bytes mean, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler import PackError, Pattern
from sparsedm_compiler.backends.wgmma.format import (
    TYPES,
    check,
    choose_layout,
    order_rows,
    pack,
    unpack,
    why_refused,
)
from sparsedm_compiler.masks.nm_mask import nm_mask
from tests.backends.wgmma.emulated import emulate, find_row

PATTERNS = (
    *("1:2@64x16", "1:4@128x16", "1:8@64x16", "2:4@64x16", "3:4@128x16", "1:2@128x32"),
    *("1:2@256x64", "1:2@64x32+2:4", "1:4@128x32+2:4", "1:2@128x64+1:4", "2:4", "1:8", "2:4t"),
)


def pruned(text: str, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols))
    weight = weight.to(dtype)
    mask = nm_mask(weight, text)
    return torch.where(mask, weight, 0), mask


def size_of(text: str) -> tuple[int, int]:
    """Rows and columns that leave a unit, and a stage, half empty where the pattern lets them."""
    pattern = Pattern.parse(text)
    height = 64 if "x" not in text else pattern.height
    return 3 * height if height < 256 else height, 3 * max(pattern.width, 32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("text", PATTERNS)
def test_unpack_of_a_packed_weight_returns_it_to_the_bit(text: str, dtype: torch.dtype) -> None:
    pattern, (rows, cols) = Pattern.parse(text), size_of(text)
    weight, mask = pruned(text, rows, cols, dtype)
    weight[mask.nonzero()[::7].unbind(1)] = -0.0
    packed = pack(weight, mask, pattern)
    check(packed, rows, cols, pattern, dtype)
    again = unpack(packed, rows, cols, pattern, dtype)
    assert torch.equal(again.view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("text", PATTERNS)
def test_kernel_addresses_multiply_by_the_masked_weight(text: str) -> None:
    pattern, (rows, cols) = Pattern.parse(text), size_of(text)
    weight, mask = pruned(text, rows, cols, torch.bfloat16)
    x = torch.randn(3, cols).to(torch.bfloat16)
    packed = pack(weight, mask, pattern)
    out = emulate(packed, x, choose_layout(pattern, rows, cols))
    torch.testing.assert_close(out, x.double() @ weight.double().T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_order_rows_is_the_order_in_which_threads_hold_sums(mixed: bool) -> None:
    order = order_rows(mixed=mixed).tolist()
    assert order == [find_row(line, block, mixed=mixed) for block in range(2) for line in range(64)]
    assert sorted(order) == list(range(128))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(TYPES),
)
def test_round_trip_of_any_size(text: str, up: int, across: int, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    rows = up * (8 if "x" not in text else pattern.height)
    cols = across * max(pattern.width, 8)
    weight, mask = pruned(text, rows, cols, dtype)
    packed = pack(weight, mask, pattern)
    assert torch.equal(unpack(packed, rows, cols, pattern, dtype), weight)


@pytest.mark.parametrize(
    ("text", "rows", "cols", "dtype", "reason"),
    [
        ("2:4", 64, 64, torch.float32, "no wgmma kernel for float32"),
        ("2:4", 60, 64, torch.bfloat16, "not multiples of 8"),
        ("3:4", 64, 64, torch.bfloat16, "keeps up to 3 of 4 columns"),
        ("1:2@32x16", 64, 64, torch.bfloat16, "not multiples of 64 rows and 16 columns"),
        ("1:2@64x8", 64, 64, torch.bfloat16, "not multiples of 64 rows and 16 columns"),
        ("1:2@64x16+2:4", 64, 64, torch.bfloat16, "not multiples of 64 rows and 32 columns"),
        ("1:2@64x32+3:4", 64, 64, torch.bfloat16, "more than 2 of 4 columns"),
        ("1:3@64x16", 64, 96, torch.bfloat16, "groups of 48 columns"),
        ("1:4@64x64", 64, 256, torch.bfloat16, "groups of 256 columns"),
        ("7:8@64x16", 64, 128, torch.bfloat16, "keeps 7 chunks of 128 columns"),
        ("1:2@64x16", 100, 64, torch.bfloat16, "not multiples of 8"),
        ("1:2@64x16", 96, 64, torch.bfloat16, "96"),
    ],
)
def test_why_refused_names_the_reason(
    text: str, rows: int, cols: int, dtype: torch.dtype, reason: str
) -> None:
    said = why_refused(Pattern.parse(text), rows, cols, dtype)
    assert said is not None
    assert reason in said
    ones = torch.ones(rows, cols, dtype=dtype)
    with pytest.raises(PackError, match="cannot be packed"):
        pack(ones, ones.bool(), Pattern.parse(text))


def test_pack_of_a_mask_of_another_pattern_raises() -> None:
    weight, mask = pruned("2:4", 64, 64, torch.bfloat16)
    with pytest.raises(PackError, match="too many chunks"):
        pack(weight, mask, Pattern.parse("1:2@64x16"))
    full = torch.ones_like(mask)
    with pytest.raises(PackError, match="more than 2 of 4"):
        pack(weight, full, Pattern.parse("2:4"))


@pytest.mark.parametrize("text", ["1:4@64x16", "1:2@64x32+2:4", "1:2@64x16", "2:4"])
def test_check_of_changed_bytes_raises(text: str) -> None:
    pattern, (rows, cols) = Pattern.parse(text), size_of(text)
    packed = pack(*pruned(text, rows, cols, torch.bfloat16), pattern)
    layout = choose_layout(pattern, rows, cols)
    for at, value in ((layout.value_bytes + layout.meta_bytes, 99), (layout.value_bytes, 0)):
        if at == layout.value_bytes and not layout.sparse:
            continue
        broken = packed.clone()
        broken[at] = value
        with pytest.raises(PackError, match="points outside"):
            check(broken, rows, cols, pattern, torch.bfloat16)
    if layout.kept > 1:  # the same chunk twice
        broken = packed.clone()
        head = layout.value_bytes + layout.meta_bytes
        broken[head + 8 : head + 12] = broken[head : head + 4]
        with pytest.raises(PackError, match="points outside"):
            check(broken, rows, cols, pattern, torch.bfloat16)
    with pytest.raises(PackError, match="takes"):
        check(packed[:-1], rows, cols, pattern, torch.bfloat16)
