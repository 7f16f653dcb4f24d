"""``Pattern``, the parsed value of a string such as "2:4", and the registry of its kinds."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import PatternError

NUMBER = r"([0-9]{1,6})"
"""Regular expression of a number in the spelling of a pattern, as one group."""


@dataclass(frozen=True, slots=True)
class Pattern(ABC):
    """A sparsity pattern of a weight: of every ``m`` weights (or blocks of them) it keeps ``n``.

    A kind of pattern is one final subclass, decorated with ``register_pattern``. It defines its
    spelling, its mask, the weights that it fits, and the other patterns that its masks satisfy; a
    kernel family lists the kinds that it runs.

    Attributes:
        n: Weights that a group keeps.
        m: Weights of a group.
        SPELLING: Regular expression that ``parse`` matches against the whole text.
        EXPLANATION: An example with its meaning, for the messages of errors.

    Raises:
        PatternError: Unless 0 < ``n`` <= ``m``.

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
        """Returns the pattern of a match of ``SPELLING``. Raises PatternError if it is illegal."""

    @abstractmethod
    def compute_mask(self, weight: Tensor) -> Tensor:
        """Returns the mask of a weight that the pattern fits.

        Args:
            weight: [out, in] or [out, in, *kernel], detached, in float16, bfloat16, float32 or
                float64. NaN and Inf count as the largest magnitudes.

        Returns:
            A bool tensor of the shape of ``weight``, True where a weight is kept.
        """

    def prepare(self, device: torch.device) -> None:  # noqa: B027 - most keep nothing
        """Makes what ``compute_mask`` keeps on a device: in a CUDA graph it could not stay."""

    @abstractmethod
    def __str__(self) -> str: ...

    @staticmethod
    def parse(text: str | Pattern) -> Pattern:
        """Returns the pattern of a text.

        Args:
            text: "n:m" keeps n of every m consecutive input channels in every output row (``NM``).
                "n:mxR" shares each mask among R consecutive output rows (``SharedNM``). "n:m@RxC"
                keeps n of every m blocks of R rows by C columns (``BlockNM``), and "n:m@RxC+n:m"
                is per-row N:M within those (``NestedNM``). "V:n:m" is the format of VENOM
                (``VNM``). "n:4t" keeps n of 4 in the rows and in the columns
                (``TransposableNM``). Spaces around the text are dropped. A ``Pattern`` is returned
                as it is.

        Returns:
            A frozen value, of the first registered kind whose spelling matches.

        Raises:
            PatternError: If ``text`` is not a string, matches no spelling, or has illegal numbers,
                e.g. n > m.

        Example:
            >>> Pattern.parse("2:4")
            NM(n=2, m=4)
            >>> Pattern.parse("1:8x16")
            SharedNM(n=1, m=8, rows=16)
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
        """True if nothing is pruned (n == m)."""
        return self.n == self.m

    @property
    def height(self) -> int:
        """The number of consecutive output rows whose masks are decided together."""
        return 1

    @property
    def height_label(self) -> str:
        """``height`` in words, for the sentence of ``misfit``."""
        return str(self.height)

    @property
    def width(self) -> int:
        """The number of consecutive input channels whose masks are decided together."""
        return self.m

    @property
    def width_label(self) -> str:
        """``width`` in words, for the sentence of ``misfit``."""
        return str(self.width)

    @property
    def most_n(self) -> int:
        """The ``n`` of a pattern of this kind and ``m`` that prunes as little as possible."""
        return self.m

    def misfit(self, out_channels: int, in_channels: int) -> str | None:
        """Returns why a weight of that size cannot take the pattern, as a sentence; None if it can.

        Args:
            out_channels: Size of the first dimension of the weight.
            in_channels: Size of the second dimension.

        Returns:
            A sentence that names the size that does not fit, or None.

        Example:
            >>> Pattern.parse("2:4").misfit(8, 6)
            'input width 6 is not a multiple of 4'
        """
        if in_channels % self.width:
            return f"input width {in_channels} is not a multiple of {self.width_label}"
        if out_channels % self.height:
            return f"output width {out_channels} is not a multiple of {self.height_label}"
        return None

    def implied(self) -> tuple[Pattern, ...]:
        """Returns other patterns that every mask of this one satisfies, the strictest first.

        A kernel of one of them can run this pattern. The default is none.

        Example:
            >>> Pattern.parse("1:8x16").implied()
            (NM(n=1, m=8),)
        """
        return ()

    def relaxations(self) -> tuple[Pattern, ...]:
        """Returns denser patterns of the same kind that lead to this one, the densest first.

        Each has twice the ``n`` of the next. Where ``n`` cannot be doubled below ``most_n``, the
        only one prunes half of what this pattern prunes, if there is such a pattern.

        Example:
            >>> [str(pattern) for pattern in Pattern.parse("1:8").relaxations()]
            ['4:8', '2:8']
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
            group: Columns of a group, which begins at a multiple of it. Sparse tensor cores take
                at most 2 of 4.

        Returns:
            The largest number of kept columns, from 1 to ``group``.

        Example:
            >>> [Pattern.parse(text).most_kept(4) for text in ("2:4", "1:2", "2:8x16", "3:4")]
            [2, 2, 2, 3]
        """
        period = math.lcm(self.width, group)
        windows = (range(start, start + group) for start in range(0, period, group))
        return max(self.count_most(window) for window in windows)

    def count_most(self, window: range) -> int:
        """Returns the most columns of a range that a mask can keep."""
        groups = Counter(column // self.m for column in window)
        return sum(min(self.n, columns) for columns in groups.values())


Kind = TypeVar("Kind", bound=type[Pattern])

_kinds: list[type[Pattern]] = []


def register_pattern(kind: Kind) -> Kind:
    """Adds a kind of pattern to those that ``Pattern.parse`` tries; the outermost class decorator.

    Nothing else is needed for a new kind: its masks are trained, saved and folded like those of
    any other. It runs by sparse kernels where ``implied`` names a pattern that they accept, and
    dense elsewhere.

    Args:
        kind: A final subclass of ``Pattern``. Its ``SPELLING`` is tried after those of the kinds
            that were registered before.

    Returns:
        The same class.

    Example:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> from typing import final
        >>> @register_pattern
        ... @final
        ... @dataclass(frozen=True, slots=True)
        ... class FirstN(Pattern):
        ...     SPELLING = re.compile("first([0-9]+):([0-9]+)")
        ...     EXPLANATION = "'first2:4' keeps the first 2 of 4"
        ...
        ...     @classmethod
        ...     def from_match(cls, match):
        ...         return FirstN(int(match[1]), int(match[2]))
        ...
        ...     def compute_mask(self, weight):
        ...         shape = (1, -1, *[1] * (weight.dim() - 2))
        ...         kept = torch.arange(weight.shape[1], device=weight.device) % self.m < self.n
        ...         return kept.view(shape).expand(weight.shape)
        ...
        ...     def __str__(self):
        ...         return f"first{self.n}:{self.m}"
        >>> Pattern.parse("first2:4").compute_mask(torch.ones(1, 4))
        tensor([[ True,  True, False, False]])
        >>> unregister_pattern(FirstN)
    """
    _kinds.append(kind)
    _parse_text.cache_clear()
    return kind


def unregister_pattern(kind: type[Pattern]) -> None:
    """Removes a kind of pattern from those that ``Pattern.parse`` tries.

    Args:
        kind: A class that ``register_pattern`` has added. Its patterns stay usable as values.

    Raises:
        ValueError: If ``kind`` is not registered.
    """
    _kinds.remove(kind)
    _parse_text.cache_clear()


def explain_patterns() -> str:
    """Returns one example of every kind with its meaning, for the messages of errors."""
    return ", ".join(kind.EXPLANATION for kind in _kinds)


@lru_cache(maxsize=256)
def _parse_text(text: str) -> Pattern:
    for kind in _kinds:
        if match := kind.SPELLING.fullmatch(text):
            return kind.from_match(match)
    raise PatternError(f"pattern {text!r} is not 'n:m' with 0 < n <= m; {explain_patterns()}")
