"""Block patterns "n:m@RxC" and "n:m@RxC+n:m": spelling, laws of their masks, what they imply."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler.errors import PatternError
from sparsedm_compiler.patterns import NM, BlockNM, NestedNM, Pattern, SharedNM
from tests.masks.mask_cases import block_cases
from tests.oracle import brute_mask

properties = settings(deadline=None, max_examples=80)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:2@64x16", BlockNM(1, 2, 64, 16)),
        ("1:4@128x16", BlockNM(1, 4, 128, 16)),
        ("2:2@1x2", BlockNM(2, 2, 1, 2)),
        ("1:2@64x32+2:4", NestedNM(1, 2, 64, 32, NM(2, 4))),
        ("2:2@64x32+1:8", NestedNM(2, 2, 64, 32, NM(1, 8))),
    ],
)
def test_parse_reads_rows_before_columns_of_a_block(text: str, expected: Pattern) -> None:
    assert Pattern.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1:2@64x1", SharedNM(1, 2, 64)), ("3:8@1x1", NM(3, 8)), ("1:2@1x1", NM(1, 2))],
)
def test_parse_of_blocks_of_one_column_returns_the_pattern_they_are(
    text: str, expected: Pattern
) -> None:
    assert Pattern.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("3:2@4x4", "'3:2@4x4' is not 'n:m' with 0 < n <= m"),
        ("0:2@4x4+2:4", r"'0:2@4x4\+2:4' is not 'n:m' with 0 < n <= m"),
        ("1:2@0x16", "'1:2@0x16' has blocks of 0 rows by 16 columns, not >= 1"),
        ("1:2@16x0", "'1:2@16x0' has blocks of 16 rows by 0 columns, not >= 1"),
        ("1:2@0x16+2:4", "has blocks of 0 rows by 16 columns, not >= 1"),
        ("1:2@16x0+2:4", "has blocks of 16 rows by 0 columns, not >= 1"),
        ("1:2@64x6+2:4", "has blocks of 6 columns, which are no whole groups of 4"),
        ("1:2@64x1+2:4", "has blocks of 1 columns, which are no whole groups of 4"),
        ("1:2@64x16+4:4", r"prunes nothing within its blocks: leave '\+4:4' out"),
        ("1:2@64x16+5:4", "'5:4' is not 'n:m' with 0 < n <= m"),
        ("1:2@64", "'1:2@64' is not 'n:m'.*'1:2@64x16' keeps 1 of 2 blocks"),
        ("1:2@64x16x2", "'1:2@64x16' keeps 1 of 2 blocks"),
        ("1:2x4@64x16", "'1:2@64x16' keeps 1 of 2 blocks"),
        ("1:2@64x16+2:4t", "'1:2@64x32.2:4' 2:4 within those"),
        ("1:2@64x16+", "'1:2@64x16' keeps 1 of 2 blocks"),
    ],
)
def test_parse_of_an_illegal_block_pattern_raises_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(PatternError, match=why):
        Pattern.parse(text)


def test_block_nm_of_one_column_raises_with_the_spelling_of_its_kind() -> None:
    with pytest.raises(PatternError, match="blocks of one column: it is '1:2x64'"):
        BlockNM(1, 2, 64, 1)


def test_density_of_nested_blocks_is_the_product() -> None:
    assert Pattern.parse("1:4@128x16").density == Fraction(1, 4)
    assert Pattern.parse("1:2@64x32+2:4").density == Fraction(1, 4)
    assert Pattern.parse("2:2@64x32+1:4").density == Fraction(1, 4)
    assert Pattern.parse("2:2@64x32").is_dense
    assert not Pattern.parse("2:2@64x32+2:4").is_dense


@pytest.mark.parametrize(
    ("text", "sizes", "reason"),
    [
        ("1:2@64x16", (64, 48), "input width 48 is not a multiple of the 32 columns of 2 blocks"),
        ("1:2@64x16", (96, 32), "output width 96 is not a multiple of the 64 rows of a block"),
        ("1:2@8x4+2:4", (8, 12), "input width 12 is not a multiple of the 8 columns of 2 blocks"),
        ("1:2@8x4+2:4", (12, 8), "output width 12 is not a multiple of the 8 rows of a block"),
        ("1:2@8x4+2:4", (16, 24), None),
        ("1:4@128x16", (256, 192), None),
    ],
)
def test_misfit_of_blocks_returns_the_reason_or_none(
    text: str, sizes: tuple[int, int], reason: str | None
) -> None:
    assert Pattern.parse(text).misfit(*sizes) == reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:2@64x16", []),
        ("1:8@64x16", ["4:8@64x16", "2:8@64x16"]),
        ("2:4@64x16", ["3:4@64x16"]),
        ("1:2@64x32+2:4", ["2:2@64x32+2:4"]),
        ("1:8@64x32+2:4", ["8:8@64x32+2:4", "4:8@64x32+2:4", "2:8@64x32+2:4"]),
        ("3:4@64x32+2:4", ["4:4@64x32+2:4"]),
        ("2:2@64x32+2:4", []),
    ],
)
def test_relaxations_of_blocks_prune_fewer_blocks(text: str, expected: list[str]) -> None:
    assert [*map(str, Pattern.parse(text).relaxations())] == expected


def split(tensor: Tensor, pattern: BlockNM | NestedNM) -> Tensor:
    """[group, block of the group, weight of the block]."""
    flat = tensor.movedim(1, -1)  # [out, *kernel, in]
    rows, columns, m = pattern.rows, pattern.columns, pattern.m
    blocks = flat.unflatten(-1, (-1, m, columns)).unflatten(0, (-1, rows)).movedim(1, -1)
    return blocks.flatten(-2).flatten(0, -3)


@properties
@given(block_cases())
def test_a_block_mask_keeps_exactly_n_whole_blocks_of_every_m(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    assert isinstance(pattern, (BlockNM, NestedNM))
    kept = split(pattern.compute_mask(weight), pattern).sum(2)
    inner = pattern.inner.density if isinstance(pattern, NestedNM) else 1
    full = int(pattern.rows * pattern.columns * inner)
    assert bool(((kept == 0) | (kept == full)).all())
    assert bool(((kept > 0).sum(1) == pattern.n).all())


@properties
@given(block_cases())
def test_a_block_mask_keeps_the_most_energy_of_all_choices(case: tuple[Tensor, Pattern]) -> None:
    """Of all masks of the pattern that prune as its inner one does, tried one after the other."""
    weight, pattern = case
    assert isinstance(pattern, (BlockNM, NestedNM))
    mask = pattern.compute_mask(weight)
    inner = brute_mask(weight, pattern.inner) if isinstance(pattern, NestedNM) else True
    energy = split(weight.double().square() * inner, pattern).sum(2)
    kept = split(weight.double().square() * mask, pattern).sum((1, 2))
    choices = combinations(range(pattern.m), pattern.n)
    best = torch.stack([energy[:, list(choice)].sum(1) for choice in choices]).amax(0)
    assert torch.equal(kept, best)


@properties
@given(block_cases(), st.sampled_from([2.0**-6, 0.25, -1.0, 8.0]))
def test_a_block_mask_is_the_same_for_a_multiple_of_the_weight(
    case: tuple[Tensor, Pattern], factor: float
) -> None:
    weight, pattern = case
    assert torch.equal(pattern.compute_mask(weight * factor), pattern.compute_mask(weight))


@properties
@given(block_cases())
def test_a_block_mask_satisfies_exactly_what_the_pattern_implies(
    case: tuple[Tensor, Pattern],
) -> None:
    weight, pattern = case
    mask = pattern.compute_mask(weight)
    assert pattern.implied()
    for implied in pattern.implied():
        assert isinstance(implied, (NM, SharedNM))
        counts = mask.unflatten(1, (-1, implied.m)).sum(2)
        assert bool((counts == implied.n).all())
        rows = mask.unflatten(0, (-1, implied.height))
        assert torch.equal(rows, rows[:, :1].expand_as(rows))


def test_a_group_of_equal_blocks_keeps_the_first() -> None:
    mask = Pattern.parse("1:3@2x2").compute_mask(torch.ones(2, 6))
    assert mask[:, :2].all()
    assert not mask[:, 2:].any()


def test_the_energy_of_a_block_is_counted_after_the_inner_mask() -> None:
    """Whole, the first block has 4 * 4 = 16 and the second 9; of their two largest, 8 and 9."""
    weight = torch.tensor([[2.0, 2.0, 2.0, 2.0, 3.0, 0.0, 0.0, 0.0]])
    assert Pattern.parse("1:2@1x4").compute_mask(weight).tolist() == [[True] * 4 + [False] * 4]
    nested = Pattern.parse("1:2@1x4+2:4").compute_mask(weight)
    assert nested.tolist() == [[False] * 4 + [True, True, False, False]]


def test_a_block_mask_of_a_convolution_is_chosen_at_every_kernel_position() -> None:
    weight = torch.zeros(2, 4, 2, 2)
    for number, (i, j) in enumerate(product(range(2), repeat=2)):
        weight[0, number // 2 * 2, i, j] = 1.0  # the upper positions in the first block
    mask = Pattern.parse("1:2@2x2").compute_mask(weight)
    assert mask[:, :2, 0].all()
    assert mask[:, 2:, 1].all()
    assert int(mask.sum()) == 16


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("1:2@64x16", 4),
        ("1:2@64x2", 2),
        ("1:3@64x3", 4),
        ("1:4@8x2", 2),
        ("1:2@64x32+2:4", 2),
        ("1:2@64x32+1:4", 1),
        ("1:2@64x32+2:8", 2),
        ("1:2@64x6+1:3", 2),
        ("1:2@64x32+3:4", 3),
        ("2:2@64x5+1:5", 2),
        ("1:2@64x5+1:5", 2),
        ("1:2@64x8+1:8", 1),
    ],
)
def test_most_kept_of_blocks_is_reached_and_never_passed(text: str, most: int) -> None:
    pattern = Pattern.parse(text)
    assert pattern.most_kept(4) == most
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(pattern.height * 400, 4 * pattern.width, generator=generator).pow(3)
    kept = pattern.compute_mask(weight).unflatten(1, (-1, 4)).sum(2)
    assert int(kept.max()) == most
