"""Compact weights: exact round trips, exact sizes, near the entropy of their masks."""

from __future__ import annotations

from itertools import combinations
from math import comb, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compiler import Pattern, PatternError
from sparsedm_compiler.errors import PackError
from sparsedm_compiler.files import CompactWeight, count_compact_bytes
from sparsedm_compiler.files.digits import choose_word, count_bytes, pack_digits, unpack_digits
from sparsedm_compiler.files.mask_code import complete_mask, decode_mask, encode_mask
from sparsedm_compiler.files.subset_rank import rank_subsets, unrank_subsets
from tests.files.cases import PATTERNS, sparse_weight
from tests.oracle import assert_same, brute_mask


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "conv"])
def test_weight_when_packed_and_unpacked_is_the_same(pattern: str, kernel: tuple[int, ...]) -> None:
    weight = sparse_weight(pattern, kernel=kernel)
    packed = CompactWeight.pack(weight, Pattern.parse(pattern))
    assert_same(packed.unpack(), weight)
    size = packed.values.nbytes + packed.indices.nbytes
    assert size == count_compact_bytes(pattern, tuple(weight.shape), 4)
    assert packed.values.numel() == weight.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_weight_of_any_dtype_when_packed_keeps_its_bits(dtype: torch.dtype) -> None:
    weight = (sparse_weight("2:4") * 1e3).to(dtype)
    assert_same(CompactWeight.pack(weight, Pattern.parse("2:4")).unpack(), weight)


def test_smallest_doubles_are_not_taken_for_zeros() -> None:
    weight = torch.tensor([[0.0, 0.0, 5e-324, 1.0]], dtype=torch.float64)
    assert_same(CompactWeight.pack(weight, Pattern.parse("2:4")).unpack(), weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_groups_with_more_zeros_than_needed_are_filled_up(pattern: str) -> None:
    weight = sparse_weight(pattern)
    weight[::3] = 0
    weight[:, ::5] = 0
    assert_same(CompactWeight.pack(weight, Pattern.parse(pattern)).unpack(), weight)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "40:80"])
def test_mask_that_a_pattern_chose_is_completed_to_itself(pattern: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 32, generator=generator)
    parsed = Pattern.parse(pattern)
    mask = brute_mask(weight, parsed)
    assert_same(complete_mask(mask, parsed), mask)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "40:80"])
def test_dense_weight_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match=r"w: the zeros do not satisfy"):
        CompactWeight.pack(torch.ones(16, 32), Pattern.parse(pattern), "w")


def test_weight_that_a_pattern_does_not_fit_is_refused() -> None:
    with pytest.raises(PatternError, match=r"does not fit w of \[16, 6\]"):
        CompactWeight.pack(torch.ones(16, 6), Pattern.parse("2:4"), "w")
    with pytest.raises(PatternError, match="one dimension"):
        count_compact_bytes("2:4", (16,), 2)


def test_subsets_are_ranked_in_the_order_of_the_combinatorial_number_system() -> None:
    """Ranks of 2 of 4: {0,1} {0,2} {1,2} {0,3} {1,3} {2,3} (Knuth, TAOCP 4A, 7.2.1.3)."""
    order = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    kept = torch.tensor([[item in subset for item in range(4)] for subset in order])
    assert rank_subsets(kept, 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert_same(unrank_subsets(torch.arange(6), 2, 4), kept)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 7), (4, 8), (30, 32)])
def test_ranks_name_every_subset_once(n: int, m: int) -> None:
    subsets = list(combinations(range(m), n))[:500]
    kept = torch.tensor([[item in subset for item in range(m)] for subset in subsets])
    ranks = rank_subsets(kept, n)
    assert len(set(ranks.tolist())) == len(subsets)
    assert int(ranks.max()) < comb(m, n)
    assert_same(unrank_subsets(ranks, n, m), kept)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2**63 - 1), st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=40))
def test_digits_of_any_base_when_packed_and_unpacked_are_the_same(
    base: int, values: list[int]
) -> None:
    numbers = torch.tensor([value % base for value in values])
    data = pack_digits(numbers, base)
    assert len(data) == count_bytes(len(values), base)
    assert_same(unpack_digits(data, len(values), base), numbers)


@pytest.mark.parametrize(
    ("base", "word"), [(4, (4, 1)), (6, (3, 1)), (8, (8, 3)), (32, (8, 5)), (90, (6, 5))]
)
def test_words_waste_as_little_as_they_can(base: int, word: tuple[int, int]) -> None:
    """As the table of docs/reference/format.md has them."""
    assert choose_word(base) == word


@pytest.mark.parametrize(
    "pattern", ["2:4", "1:8", "4:8", "16:32", "64:2:8", "2:4t", "1:2@16x8+2:4"]
)
def test_masks_take_a_tenth_more_than_their_entropy_at_most(pattern: str) -> None:
    parsed = Pattern.parse(pattern)
    bits = {
        "2:4": 256 * 64 * log2(6),
        "1:8": 256 * 32 * 3,
        "4:8": 256 * 32 * log2(70),
        "16:32": 256 * 8 * log2(comb(32, 16)),
        "64:2:8": 4 * 32 * log2(70) + 256 * 32 * log2(6),
        "2:4t": 64 * 64 * log2(90),
        "1:2@16x8+2:4": 16 * 16 * 1 + 256 * 32 * log2(6),
    }[pattern]
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    data = encode_mask(parsed.compute_mask(weight), parsed)
    assert bits / 8 <= len(data) <= 1.1 * bits / 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([255, 0], "out of range: a group has 6 masks"),  # 6^3 = 216
        ([0, 6], "out of range"),  # of the second word only one digit is there
        ([0], "1 indices of torch.uint8, not the 2 bytes"),
        ([0, 0, 0], "3 indices"),
    ],
)
def test_indices_that_name_no_mask_are_refused(data: list[int], message: str) -> None:
    pattern = Pattern.parse("2:4")
    assert decode_mask(torch.tensor([0, 5], dtype=torch.uint8), pattern, (2, 8)).sum() == 8
    with pytest.raises(PackError, match=message):
        decode_mask(torch.tensor(data, dtype=torch.uint8), pattern, (2, 8))
