"""``BlockNM``, spelled "n:m@RxC": whole blocks are kept; ``NestedNM`` has n:m within them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, final

import torch
from torch import Tensor

from ..errors import PatternError
from ..selection.top_n import KEYS, select_top_n
from .pattern import NUMBER, Pattern, explain_patterns, register_pattern
from .per_row import NM
from .shared_rows import SharedNM

_BLOCK = rf"{NUMBER}:{NUMBER}@{NUMBER}x{NUMBER}"


@register_pattern
@final
@dataclass(frozen=True, slots=True)
class BlockNM(Pattern):
    """N:M sparsity of blocks: of ``m`` neighbours along the input channels, ``n`` are kept whole.

    Blocks are ``rows`` consecutive output rows by ``columns`` consecutive input channels, at every
    kernel position of a convolution. A group keeps the blocks whose sums of squares are the
    largest; of equal sums the lowest index wins. With one column it is ``SharedNM``, as which
    ``parse`` reads it.

    Attributes:
        n: Blocks that a group keeps.
        m: Blocks of a group, side by side along the input channels.
        rows: R, the output rows of a block.
        columns: C, the input channels of a block, at least 2.

    Raises:
        PatternError: Unless 0 < ``n`` <= ``m``, ``rows`` >= 1 and ``columns`` >= 2.

    Example:
        >>> str(BlockNM(1, 2, rows=64, columns=16))
        '1:2@64x16'
        >>> Pattern.parse("1:2@64x1")
        SharedNM(n=1, m=2, rows=64)
    """

    rows: int
    columns: int

    SPELLING: ClassVar[re.Pattern[str]] = re.compile(_BLOCK)
    EXPLANATION: ClassVar[str] = "'1:2@64x16' keeps 1 of 2 blocks of 64 rows by 16 columns"

    def __post_init__(self) -> None:
        Pattern.__post_init__(self)
        if self.rows < 1 or self.columns < 1:
            raise PatternError(
                f"pattern '{self}' has blocks of {self.rows} rows by {self.columns} columns, "
                f"not >= 1 each; {explain_patterns()}"
            )
        if self.columns == 1:
            plain = _make_thin(self.n, self.m, self.rows)
            raise PatternError(f"pattern '{self}' has blocks of one column: it is '{plain}'")

    @classmethod
    def from_match(cls, match: re.Match[str]) -> NM | SharedNM | BlockNM:
        n, m, rows, columns = map(int, match.groups())
        return BlockNM(n, m, rows, columns) if columns != 1 else _make_thin(n, m, rows)

    @property
    def height(self) -> int:
        return self.rows

    @property
    def height_label(self) -> str:
        return f"the {self.rows} rows of a block"

    @property
    def width(self) -> int:
        return self.m * self.columns

    @property
    def width_label(self) -> str:
        return f"the {self.width} columns of {self.m} blocks"

    def implied(self) -> tuple[Pattern, ...]:
        kept = self.n * self.columns
        shared = () if self.rows == 1 else (SharedNM(kept, self.width, self.rows),)
        return (*shared, NM(kept, self.width))

    def compute_mask(self, weight: Tensor) -> Tensor:
        mask = torch.empty_like(weight, dtype=torch.bool)
        view_blocks(mask, self.rows, self.columns).copy_(self.select_blocks(weight))
        return mask

    def select_blocks(self, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns True for the kept blocks: [out / rows, 1, in / columns, 1, *kernel].

        mask: True for the weights whose energy counts; None: all of them.
        """
        energy = sum_block_energy(weight, self.rows, self.columns, mask)
        return select_top_n(energy, self.n, self.m).unsqueeze(1).unsqueeze(3)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}@{self.rows}x{self.columns}"

    def count_most(self, window: range) -> int:
        return self.count_most_within(window, len)

    def count_most_within(self, window: range, count: Callable[[Sequence[int]], int]) -> int:
        """Returns the most columns of a range that n blocks of a group keep.

        count: Returns how many of some columns of one block it keeps.
        """
        blocks = defaultdict[int, list[int]](list)
        for column in window:
            blocks[column // self.columns].append(column)
        groups = defaultdict[int, list[int]](list)
        for block, columns in blocks.items():
            groups[block // self.m].append(count(columns))
        return sum(sum(sorted(counts, reverse=True)[: self.n]) for counts in groups.values())


@register_pattern
@final
@dataclass(frozen=True, slots=True)
class NestedNM(Pattern):
    """Per-row N:M sparsity within the blocks that a ``BlockNM`` keeps.

    The mask of ``inner`` is chosen first. Then a group keeps the ``n`` blocks whose sums of squares
    over the weights that ``inner`` keeps are the largest; of equal sums the lowest index wins.

    Attributes:
        n: Blocks that a group keeps; ``m`` of them is ``inner`` alone.
        m: Blocks of a group, side by side along the input channels.
        rows: R, the output rows of a block.
        columns: C, the input channels of a block: whole groups of ``inner``.
        inner: The pattern within the kept blocks, which prunes.

    Raises:
        PatternError: Unless 0 < ``n`` <= ``m``, ``rows`` >= 1, ``columns`` is a multiple of
            ``inner.m``, and ``inner.n`` < ``inner.m``.

    Example:
        >>> pattern = NestedNM(1, 2, rows=64, columns=32, inner=NM(2, 4))
        >>> str(pattern), pattern.density
        ('1:2@64x32+2:4', Fraction(1, 4))
    """

    rows: int
    columns: int
    inner: NM

    SPELLING: ClassVar[re.Pattern[str]] = re.compile(rf"{_BLOCK}\+{NUMBER}:{NUMBER}")
    EXPLANATION: ClassVar[str] = "'1:2@64x32+2:4' 2:4 within those"

    def __post_init__(self) -> None:
        Pattern.__post_init__(self)
        if self.inner.is_dense:
            raise PatternError(
                f"pattern '{self}' prunes nothing within its blocks: leave '+{self.inner}' out"
            )
        if self.columns % self.inner.m:
            raise PatternError(
                f"pattern '{self}' has blocks of {self.columns} columns, which are no whole groups "
                f"of {self.inner.m}; '1:2@64x32+2:4' has"
            )
        _ = self.block  # raises for numbers below 1

    @classmethod
    def from_match(cls, match: re.Match[str]) -> NestedNM:
        n, m, rows, columns, *inner = map(int, match.groups())
        return NestedNM(n, m, rows, columns, NM(*inner))

    @property
    def block(self) -> BlockNM:
        """The pattern of the blocks alone."""
        return BlockNM(self.n, self.m, self.rows, self.columns)

    @property
    def density(self) -> Fraction:
        return self.block.density * self.inner.density

    @property
    def is_dense(self) -> bool:
        return False

    @property
    def height(self) -> int:
        return self.block.height

    @property
    def height_label(self) -> str:
        return self.block.height_label

    @property
    def width(self) -> int:
        return self.block.width

    @property
    def width_label(self) -> str:
        return self.block.width_label

    def implied(self) -> tuple[Pattern, ...]:
        kept = self.n * self.columns * self.inner.n // self.inner.m
        return (NM(kept, self.width),)

    def relaxations(self) -> tuple[Pattern, ...]:
        """Returns denser patterns of the same ``inner``: all blocks first, then fewer.

        Example:
            >>> [str(pattern) for pattern in Pattern.parse("1:4@64x32+2:4").relaxations()]
            ['4:4@64x32+2:4', '2:4@64x32+2:4']
        """
        counts, n = list[int](), 2 * self.n
        while n < self.m:
            counts.insert(0, n)
            n *= 2
        if self.n < self.m:
            counts.insert(0, self.m)
        return tuple(replace(self, n=count) for count in counts)

    def compute_mask(self, weight: Tensor) -> Tensor:
        mask = self.inner.compute_mask(weight)
        chosen = self.block.select_blocks(weight, mask)
        view_blocks(mask, self.rows, self.columns).logical_and_(chosen)
        return mask

    def __str__(self) -> str:
        return f"{self.n}:{self.m}@{self.rows}x{self.columns}+{self.inner}"

    def count_most(self, window: range) -> int:
        return self.block.count_most_within(window, self._count_most_inner)

    def _count_most_inner(self, columns: Sequence[int]) -> int:
        groups = Counter(column // self.inner.m for column in columns)
        return sum(min(self.inner.n, count) for count in groups.values())


def view_blocks(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """Views [out, in, *kernel] as [out / rows, rows, in / columns, columns, *kernel]."""
    return torch.unflatten(torch.unflatten(tensor, 1, (-1, columns)), 0, (-1, rows))


def sum_block_energy(weight: Tensor, rows: int, columns: int, mask: Tensor | None = None) -> Tensor:
    """Returns sums of squares over blocks: [out / rows, in / columns, *kernel].

    They are float64 for a float64 weight and float32 for any other. ``mask``: True for the weights
    that count; None: all of them.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    squares = weight.to(wide).square()
    if mask is not None:  # by a product of bits, which also makes a NaN zero
        squares.view(KEYS[wide]).mul_(mask.view(torch.int8))
    by_column = torch.unflatten(squares, 0, (-1, rows)).sum(1)
    return torch.unflatten(by_column, 1, (-1, columns)).sum(2)


def _make_thin(n: int, m: int, rows: int) -> NM | SharedNM:
    """Returns the pattern that blocks of one column are."""
    return NM(n, m) if rows == 1 else SharedNM(n, m, rows)
