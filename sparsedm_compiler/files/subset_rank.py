"""Subsets as numbers: the n kept of m items are one of C(m, n), in the combinatorial number system.

The rank of the subset {c_1 < ... < c_n} is C(c_1, 1) + ... + C(c_n, n) (Knuth, TAOCP 4A, 7.2.1.3).
"""

from __future__ import annotations

from functools import lru_cache
from math import comb

import torch
from torch import Tensor

_ITEMS = 1 << 22
"""Items that are worked on at a time, so that 64-bit ranks of a large weight need little memory."""


def rank_subsets(kept: Tensor, n: int) -> Tensor:
    """Returns the rank of every subset: int64 [count], below C(m, n), which must be below 2^63.

    kept: bool [count, m] with exactly ``n`` True in every row.
    """
    table = _binomials(n, kept.shape[1])
    parts = [_rank(part, table) for part in torch.split(kept, _step(kept.shape[1]))]
    return torch.cat(parts) if parts else kept.new_zeros(0, dtype=torch.int64)


def _rank(kept: Tensor, table: Tensor) -> Tensor:
    counts = kept.cumsum(1)  # how many are kept up to and with an item: 1 .. n where one is
    terms = table[torch.arange(kept.shape[1], device="cpu"), counts]
    return torch.where(kept, terms, 0).sum(1)


def unrank_subsets(ranks: Tensor, n: int, m: int) -> Tensor:
    """Returns the subsets of these ranks, which lie below C(m, n): bool [count, m]."""
    table = _binomials(n, m)
    kept = torch.zeros(len(ranks), m, dtype=torch.bool, device="cpu")
    for part, out in zip(torch.split(ranks, _step(m)), torch.split(kept, _step(m)), strict=True):
        rest, left = part.clone(), torch.full_like(part, n)
        for item in reversed(range(m)):
            term = table[item][left]
            taken = (left > 0) & (rest >= term)
            out[:, item] = taken
            rest -= torch.where(taken, term, 0)
            left -= taken.to(left.dtype)
    return kept


def _step(m: int) -> int:
    return max(1, _ITEMS // max(1, m))


@lru_cache(maxsize=64)
def _binomials(n: int, m: int) -> Tensor:
    """Returns C(item, count) for every item below m and count up to n: int64 [m, n + 1]."""
    return torch.tensor(
        [[comb(item, count) for count in range(n + 1)] for item in range(m)], device="cpu"
    )
