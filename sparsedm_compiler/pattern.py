"""``Pattern``: the parsed value of "2:4", "2:4t", "1:8x16" or "64:2:8"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .errors import PatternError

VNM_COLUMNS = 4
"""Columns of every m that the rows of one V:n:m block share (Castro et al. 2023, VENOM)."""

TILE = 4
"""Rows and columns of the tiles that a transposable mask is made of (Hubara et al. 2021)."""

_WAYS_OUT = (
    "'2:4' keeps 2 of 4, '2:4t' 2 of 4 of the rows and of the columns, '1:8x16' shares a mask "
    "among 16 rows, '64:2:8' is V:n:m"
)
_NUMBER = r"([0-9]{1,6})"
_N_M = re.compile(rf"{_NUMBER}:{_NUMBER}(?:x{_NUMBER})?")
_N_M_T = re.compile(rf"{_NUMBER}:{_NUMBER}t")
_WITH_T = re.compile(r"[0-9:x]*t[0-9:xt]*")
_V_N_M = re.compile(rf"{_NUMBER}:{_NUMBER}:{_NUMBER}")


@dataclass(frozen=True, slots=True)
class Pattern:
    """N:M sparsity: every group of ``m`` weights along the input channels keeps ``n``.

    ``rows`` consecutive output rows share one mask (1: each row has its own). With ``vnm`` the
    rows share only the choice of 4 columns of every ``m``, and each row keeps ``n`` of those 4.
    ``transposable``: in every aligned 4x4 tile of [out, in] each row and each column keeps ``n``,
    so that the transposed weight is n:4 as well.

    >>> Pattern.parse("1:8").density
    Fraction(1, 8)
    >>> Pattern.parse("64:2:8")
    Pattern(n=2, m=8, rows=64, vnm=True, transposable=False)
    >>> str(Pattern.parse("1:8x16"))
    '1:8x16'
    """

    n: int
    m: int
    rows: int = 1
    vnm: bool = False
    transposable: bool = False

    def __post_init__(self) -> None:
        if self.transposable and not (
            0 < self.n < self.m == TILE and self.rows == 1 and not self.vnm
        ):
            raise _not_transposable(str(self))
        if not 0 < self.n <= self.m:
            raise PatternError(f"pattern '{self}' is not 'n:m' with 0 < n <= m; {_WAYS_OUT}")
        if self.rows < 1:
            raise PatternError(f"pattern '{self}' shares its mask among {self.rows} rows, not >= 1")
        if self.vnm and not (self.n <= VNM_COLUMNS <= self.m):
            raise PatternError(
                f"pattern '{self}' is not V:n:m with n <= {VNM_COLUMNS} <= m: each row keeps n "
                f"of the {VNM_COLUMNS} columns its block shares, e.g. '64:2:8'"
            )

    @staticmethod
    @lru_cache(maxsize=256)
    def _parse(text: str) -> Pattern:
        if found := _N_M.fullmatch(text):
            n, m, rows = (int(part) if part else 1 for part in found.groups())
            return Pattern(n, m, rows)
        if found := _V_N_M.fullmatch(text):
            v, n, m = map(int, found.groups())
            return Pattern(n, m, v, vnm=True)
        if found := _N_M_T.fullmatch(text):
            n, m = map(int, found.groups())
            return Pattern(n, m, transposable=True)
        if _WITH_T.fullmatch(text):
            raise _not_transposable(text)
        raise PatternError(f"pattern {text!r} is not 'n:m' with 0 < n <= m; {_WAYS_OUT}")

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """The pattern that ``text`` spells; a ``Pattern`` passes through. Raises PatternError."""
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise PatternError(f"pattern {text!r} is not a string; {_WAYS_OUT}")
        return cls._parse(text.strip())

    @property
    def density(self) -> Fraction:
        """The kept share of the weights, exactly."""
        return Fraction(self.n, self.m)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned (n == m)."""
        return self.n == self.m

    @property
    def height(self) -> int:
        """Consecutive output rows whose masks are decided together."""
        return TILE if self.transposable else self.rows

    def misfit(self, out_channels: int, in_channels: int) -> str | None:
        """Why a weight of that size cannot take the pattern, as a sentence, or None."""
        if in_channels % self.m:
            return f"input width {in_channels} is not a multiple of {self.m}"
        if out_channels % self.height:
            what = str(TILE) if self.transposable else f"the {self.rows} shared rows"
            return f"output width {out_channels} is not a multiple of {what}"
        return None

    def __str__(self) -> str:
        if self.vnm:
            return f"{self.rows}:{self.n}:{self.m}"
        shared = f"x{self.rows}" if self.rows != 1 else ""
        return f"{self.n}:{self.m}{shared}{'t' if self.transposable else ''}"


def _not_transposable(text: str) -> PatternError:
    return PatternError(
        f"pattern {text!r} is not one of '1:4t', '2:4t' and '3:4t', which alone are transposable; "
        f"{_WAYS_OUT}"
    )
