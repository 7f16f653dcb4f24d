"""``Pattern``: the parsed value of a string such as "2:4", whatever its kind."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar, TypeVar

from torch import Tensor

from ..errors import PatternError

NUMBER = r"([0-9]{1,6})"
"""A number in the spelling of a pattern."""


@dataclass(frozen=True, slots=True)
class Pattern(ABC):
    """N:M sparsity of one kind: every group of ``m`` weights along the input channels keeps ``n``.

    A kind of pattern is one final subclass, decorated with ``register_pattern``. It states its
    spelling, its mask, and which other patterns its masks satisfy; a kernel family lists the
    kinds that it runs.

    Attributes:
        n: Weights that a group keeps.
        m: Weights of a group.
        SPELLING: What ``parse`` matches against the whole text.
        EXPLANATION: An example with its meaning, for the messages of errors.

    Example:
        >>> Pattern.parse("1:8").density
        Fraction(1, 8)
        >>> Pattern.parse("64:2:8")
        VNM(n=2, m=8, rows=64)
        >>> str(Pattern.parse("1:8x16"))
        '1:8x16'
    """

    n: int
    m: int

    SPELLING: ClassVar[re.Pattern[str]]
    EXPLANATION: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise PatternError(
                f"pattern '{self}' is not 'n:m' with 0 < n <= m; {explain_patterns()}"
            )

    @classmethod
    @abstractmethod
    def from_match(cls, match: re.Match[str]) -> Pattern:
        """Returns the pattern that a match of ``SPELLING`` spells. Raises PatternError."""

    @abstractmethod
    def compute_mask(self, weight: Tensor) -> Tensor:
        """Returns the mask of a weight that the pattern fits: True where a weight is kept.

        weight: [out, in] or [out, in, *kernel], detached, in float16, bfloat16, float32 or
        float64; NaN and Inf count as the largest magnitudes. The mask is bool, of its shape.
        """

    @abstractmethod
    def __str__(self) -> str: ...

    @staticmethod
    def parse(text: str | Pattern) -> Pattern:
        """Returns the pattern that a string spells; a ``Pattern`` passes through.

        Args:
            text: "n:m" keeps n of every m weights along the input channels; "n:mxR" shares each
                mask among R consecutive output rows, "V:n:m" is VENOM's format, and "n:4t" is
                transposable.

        Returns:
            The frozen value of the kind that ``text`` spells.

        Raises:
            PatternError: If ``text`` is no string or spells no pattern.

        Example:
            >>> Pattern.parse("2:4")
            NM(n=2, m=4)
        """
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise PatternError(f"pattern {text!r} is not a string; {explain_patterns()}")
        return _parse_text(text.strip())

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
        return 1

    @property
    def most_n(self) -> int:
        """The ``n`` that prunes the least a pattern of this kind and ``m`` can prune."""
        return self.m

    def misfit(self, out_channels: int, in_channels: int) -> str | None:
        """Returns why a weight of that size cannot take the pattern, as a sentence, or None."""
        if in_channels % self.m:
            return f"input width {in_channels} is not a multiple of {self.m}"
        if out_channels % self.height:
            return f"output width {out_channels} is not a multiple of {self.height}"
        return None

    def implied(self) -> tuple[Pattern, ...]:
        """Returns other patterns that every mask of this one satisfies, whose kernels can run it.

        The strictest comes first; none where the kind says nothing.
        """
        return ()

    def relaxations(self) -> tuple[Pattern, ...]:
        """Returns denser patterns of the same kind on the way to this one, the densest first.

        ``n`` doubles from one to the one before. Where no doubling is possible, the only one
        prunes half of what this pattern prunes; there is none where that is no other pattern.
        """
        n, counts = self.n, list[int]()
        while 2 * n < self.most_n:
            n *= 2
            counts.insert(0, n)
        middle = (self.n + self.most_n) // 2
        if not counts and self.n < middle < self.most_n:
            counts = [middle]
        return tuple(replace(self, n=count) for count in counts)

    def most_kept(self, group: int = 4) -> int:
        """Returns the most columns of an aligned group that a mask of this pattern can keep.

        Args:
            group: Columns of a group, aligned to multiples of it; sparse tensor cores take at most
                2 of 4.

        Returns:
            The largest number of kept columns, from 1 to ``group``.

        Example:
            >>> [Pattern.parse(text).most_kept(4) for text in ("2:4", "1:2", "2:8x16", "3:4")]
            [2, 2, 2, 3]
        """
        n, m = self.n, self.m
        windows = (range(start, start + group) for start in range(0, math.lcm(m, group), group))
        return max(
            sum(
                min(n, sum(column // m == block for column in window))
                for block in {column // m for column in window}
            )
            for window in windows
        )


Kind = TypeVar("Kind", bound=type[Pattern])

_kinds: list[type[Pattern]] = []


def register_pattern(kind: Kind) -> Kind:
    """Makes ``Pattern.parse`` know a kind of pattern: a class decorator, put outermost.

    Args:
        kind: A final subclass of ``Pattern``. Its ``SPELLING`` is tried after those of the kinds
            registered before.

    Returns:
        The same class.
    """
    _kinds.append(kind)
    _parse_text.cache_clear()
    return kind


def unregister_pattern(kind: type[Pattern]) -> None:
    """Makes ``Pattern.parse`` forget a kind of pattern."""
    _kinds.remove(kind)
    _parse_text.cache_clear()


def iterate_patterns() -> Iterator[type[Pattern]]:
    """Yields the registered kinds of pattern, in the order in which they are tried."""
    yield from _kinds


def explain_patterns() -> str:
    """Returns one example of every kind with its meaning, for the messages of errors."""
    return ", ".join(kind.EXPLANATION for kind in _kinds)


@lru_cache(maxsize=256)
def _parse_text(text: str) -> Pattern:
    for kind in _kinds:
        if match := kind.SPELLING.fullmatch(text):
            return kind.from_match(match)
    raise PatternError(f"pattern {text!r} is not 'n:m' with 0 < n <= m; {explain_patterns()}")
