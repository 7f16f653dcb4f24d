"""``Pattern``: the strings it reads and refuses, and its text."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compiler.errors import PatternError, SparseDMError
from sparsedm_compiler.patterns import NM, VNM, Pattern, SharedNM, TransposableNM
from tests.masks.mask_cases import block_patterns


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    """Any legal pattern."""
    m = draw(st.integers(1, 64))
    if draw(st.integers(0, 3)) == 0:
        return draw(block_patterns())
    if draw(st.integers(0, 9)) == 0:
        return TransposableNM(draw(st.integers(1, 3)), 4)
    if draw(st.booleans()) and m >= 4:
        return VNM(draw(st.integers(1, 4)), m, draw(st.integers(1, 128)))
    rows, n = draw(st.integers(1, 128)), draw(st.integers(1, m))
    return NM(n, m) if rows == 1 else SharedNM(n, m, rows)


@settings(deadline=None)
@given(patterns())
def test_parse_of_the_text_of_a_pattern_returns_it(pattern: Pattern) -> None:
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse(f"  {pattern}\n") == pattern
    assert Pattern.parse(pattern) is pattern


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", NM(2, 4)),
        ("1:8", NM(1, 8)),
        ("31:32", NM(31, 32)),
        ("4:4", NM(4, 4)),
        ("1:8x16", SharedNM(1, 8, 16)),
        ("64:2:8", VNM(2, 8, 64)),
        ("1:2:4", VNM(2, 4, 1)),
        ("1:4t", TransposableNM(1, 4)),
        ("2:4t", TransposableNM(2, 4)),
        ("3:4t", TransposableNM(3, 4)),
    ],
)
def test_parse_reads_n_as_kept_and_m_as_the_group(text: str, expected: Pattern) -> None:
    assert Pattern.parse(text) == expected
    assert str(expected) == text


NOT_TWO_NUMBERS = ["", "2", "2/4", "2:4:", "-1:4", "2.0:4", "a:b", "2 : 4", "9999999:9999999"]
NOT_N_OF_M = ["4:2", "0:4", "0:0", "0:2:8", "64:5:8", "64:1:3", "1:2:3:4"]
NOT_SHARED = ["2:4x", "2:4x0", "1:8x16x2", "2:4x1:2", "0:2:4"]


@pytest.mark.parametrize("text", NOT_TWO_NUMBERS + NOT_N_OF_M + NOT_SHARED)
def test_parse_of_illegal_text_raises_with_an_example(text: str) -> None:
    with pytest.raises(PatternError, match=r"2:4|64:2:8|not >= 1"):
        Pattern.parse(text)


TEXTS_WITH_T = ["2:8t", "4:4t", "0:4t", "5:4t", "1:2t", "2:4tx4", "2:4x4t", "64:2:4t", "2:4tt", "t"]


@pytest.mark.parametrize("text", TEXTS_WITH_T)
def test_parse_of_a_transposable_pattern_other_than_n_of_4_raises(text: str) -> None:
    ways = f"'{text}' is not one of '1:4t', '2:4t' and '3:4t', which alone are transposable"
    with pytest.raises(PatternError, match=ways):
        Pattern.parse(text)


@pytest.mark.parametrize("options", [{"m": 8}, {"n": 4}, {"n": 0}], ids=str)
def test_transposable_nm_with_illegal_numbers_raises(options: dict[str, Any]) -> None:
    with pytest.raises(PatternError, match="which alone are transposable"):
        TransposableNM(**{"n": 2, "m": 4, **options})


@pytest.mark.parametrize("value", [None, 24, 0.5, (2, 4), b"2:4"])
def test_parse_of_other_types_raises(value: Any) -> None:
    with pytest.raises(PatternError, match="is not a string"):
        Pattern.parse(value)


def test_pattern_error_is_a_value_error_with_the_value() -> None:
    with pytest.raises(ValueError, match="'4:2'"):
        Pattern.parse("4:2")
    assert issubclass(PatternError, SparseDMError)


def test_density_is_exact() -> None:
    assert Pattern.parse("31:32").density == Fraction(31, 32)
    assert Pattern.parse("1:8x16").density == Fraction(1, 8)
    assert Pattern.parse("64:2:8").density == Fraction(1, 4)
    assert Pattern.parse("3:4t").density == Fraction(3, 4)


@settings(deadline=None)
@given(patterns())
def test_is_dense_where_density_is_one(pattern: Pattern) -> None:
    assert pattern.is_dense == (pattern.density == 1)


@pytest.mark.parametrize(
    ("text", "sizes", "reason"),
    [
        ("2:4", (8, 3), "input width 3 is not a multiple of 4"),
        ("1:8x16", (24, 8), "output width 24 is not a multiple of the 16 shared rows"),
        ("64:2:8", (32, 8), "output width 32 is not a multiple of the 64 shared rows"),
        ("64:2:8", (64, 12), "input width 12 is not a multiple of 8"),
        ("2:4t", (6, 8), "output width 6 is not a multiple of 4"),
        ("2:4t", (8, 6), "input width 6 is not a multiple of 4"),
        ("2:4t", (12, 8), None),
        ("2:4", (7, 8), None),
        ("1:8x16", (32, 16), None),
        ("64:2:8", (128, 8), None),
    ],
)
def test_misfit_returns_the_reason_or_none(
    text: str, sizes: tuple[int, int], reason: str | None
) -> None:
    assert Pattern.parse(text).misfit(*sizes) == reason


def test_pattern_is_frozen_and_hashable() -> None:
    pattern = Pattern.parse("2:4")
    with pytest.raises(FrozenInstanceError):
        pattern.n = 3  # type: ignore[misc]
    assert len({pattern, NM(2, 4), SharedNM(2, 4, 2)}) == 2
    assert Pattern.parse("2:4t") != pattern
