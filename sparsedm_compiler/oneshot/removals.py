"""The removals that a pattern allows in one group of columns, and the cheapest of them.

OBS (Hassibi & Stork 1993): with B the block of the inverse Hessian that belongs to a group, setting
the weights S of a row to zero costs ``w_S^T (B_SS)^-1 w_S``, once all other weights have adapted.
Few removals are all tried, so that the choice is exact; of many, weights go one by one, the
cheapest first (OBC, Frantar & Alistarh 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import torch
from torch import Tensor

from ..patterns import NM, VNM, BlockNM, Pattern, SharedNM, TransposableNM
from ..patterns.vnm import SHARED_COLUMNS

MOST_REMOVALS = 128
"""Removals of a group that are all tried; of more, weights are removed one by one."""
MOST_QUADS = 2048
"""Choices of shared columns of V:n:m that are all tried."""
CHUNK = 1 << 23
"""Numbers that a step works on at a time."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What is removed from a group of g columns in every row.

    Attributes:
        pruned: bool [rows, g], True for removed weights, equally many in every row.
        pull: [rows, g], ``(B_SS)^-1 w_S`` at the removed weights, else 0: the weights F that are
            not settled yet adapt by ``w_F -= pull @ B_GF``.
    """

    pruned: Tensor
    pull: Tensor


def is_known(pattern: Pattern) -> bool:
    """Returns whether ``remove_cheapest`` knows the pattern's kind."""
    return isinstance(pattern, NM | SharedNM | VNM | TransposableNM | BlockNM)


def remove_cheapest(pattern: Pattern, weight: Tensor, inverse: Tensor) -> Removal:
    """Chooses the removal of a group that costs least.

    Args:
        pattern: A pattern that ``is_known``.
        weight: float64 [rows, g]: the columns of one group, ``g`` is the pattern's width.
        inverse: float64 [g, g]: the group's block of the inverse Hessian of all columns that are
            not settled yet.

    Returns:
        The removal; of equally cheap ones the first.
    """
    height = pattern.height
    per_row = max(1, weight.shape[1] * min(MOST_REMOVALS, 2 * weight.shape[1]))
    size = max(1, CHUNK // (per_row * height)) * height
    parts = [_remove(pattern, part, inverse) for part in torch.split(weight, size)]
    return Removal(torch.cat([p.pruned for p in parts]), torch.cat([p.pull for p in parts]))


def _remove(pattern: Pattern, weight: Tensor, inverse: Tensor) -> Removal:
    count = math.comb(pattern.m, pattern.n)
    if count > MOST_REMOVALS:
        return _remove_one_by_one(pattern, weight, inverse)
    columns = _list_removals(pattern, weight.device)
    if columns.shape[1] == 0:
        return Removal(torch.zeros_like(weight, dtype=torch.bool), torch.zeros_like(weight))
    blocks = inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
    inverses = torch.linalg.inv_ex(blocks)[0]  # positive definite: no card is asked for an error
    chosen = weight[:, columns]
    pulls = torch.einsum("rck,ckl->rcl", chosen, inverses)
    index = _choose(pattern, (pulls * chosen).sum(2))
    pull = torch.zeros_like(weight)
    pull.scatter_(1, columns[index], pulls[torch.arange(len(index), device=index.device), index])
    pruned = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, columns[index], True)
    return Removal(pruned, pull)


@lru_cache(maxsize=64)
def _list_removals(pattern: Pattern, device: torch.device) -> Tensor:
    """Returns the removed columns of every removal of a row: integers [removals, removed]."""
    blocks = list(combinations(range(pattern.m), pattern.m - pattern.n))
    if isinstance(pattern, BlockNM):
        wide = range(pattern.columns)
        listed = [[b * pattern.columns + c for b in chosen for c in wide] for chosen in blocks]
    else:
        listed = [list(chosen) for chosen in blocks]
    return torch.tensor(listed, dtype=torch.int64, device=device).view(len(blocks), -1)


def _choose(pattern: Pattern, costs: Tensor) -> Tensor:
    """Returns the number of the removal of every row [rows], from costs [rows, removals]."""
    if isinstance(pattern, TransposableNM):
        legal = _list_tiles(pattern.n, costs.device)
        tiles = torch.unflatten(costs, 0, (-1, pattern.m))
        totals = torch.stack([tiles[:, row, legal[:, row]] for row in range(pattern.m)]).sum(0)
        return legal[totals.argmin(1)].flatten()
    if isinstance(pattern, VNM):
        quads = _list_quads(pattern, costs.device)
        if quads is None:
            raise AssertionError("the removals of such a pattern are not listed")
        best, which = costs[:, quads].min(2)  # of every row, by the columns that its block shares
        shared = torch.unflatten(best, 0, (-1, pattern.rows)).sum(1).argmin(1)
        shared = shared.repeat_interleave(pattern.rows)
        return quads[shared, which.gather(1, shared.unsqueeze(1)).squeeze(1)]
    rows = pattern.height
    return torch.unflatten(costs, 0, (-1, rows)).sum(1).argmin(1).repeat_interleave(rows)


@lru_cache(maxsize=16)
def _list_tiles(n: int, device: torch.device) -> Tensor:
    """Returns the removals of the 4 rows of every transposable tile: integers [tiles, 4]."""
    removals = list(combinations(range(4), 4 - n))
    level = [4 - n] * 4
    legal = [
        choice
        for choice in product(range(len(removals)), repeat=4)
        if [sum(c in removals[r] for r in choice) for c in range(4)] == level
    ]
    return torch.tensor(legal, device=device)


@lru_cache(maxsize=16)
def _list_quads(pattern: VNM, device: torch.device) -> Tensor | None:
    """Returns the removals that leave only shared columns: integers [choices of columns, each].

    None where there are too many choices.
    """
    if math.comb(pattern.m, SHARED_COLUMNS) > MOST_QUADS:
        return None
    removals = [{*chosen} for chosen in combinations(range(pattern.m), pattern.m - pattern.n)]
    listed = [
        [k for k, removed in enumerate(removals) if removed | {*quad} == {*range(pattern.m)}]
        for quad in combinations(range(pattern.m), SHARED_COLUMNS)
    ]
    return torch.tensor(listed, device=device)


def _remove_one_by_one(pattern: Pattern, weight: Tensor, inverse: Tensor) -> Removal:
    """Removes weight after weight, each time the cheapest for the rows that share a mask."""
    rows = pattern.height
    work = torch.unflatten(weight, 0, (-1, rows)).clone()  # [sets, rows of a set, g]
    blocks = inverse.repeat(len(work), 1, 1)
    pruned = torch.zeros(work.shape[0], work.shape[2], dtype=torch.bool, device=work.device)
    left = SHARED_COLUMNS if isinstance(pattern, VNM) else pattern.n
    for _ in range(pattern.m - left):
        _remove_one(work, blocks, pruned)
    if isinstance(pattern, VNM):  # each row goes on alone
        work = work.flatten(0, 1).unsqueeze(1)
        blocks, pruned = blocks.repeat_interleave(rows, 0), pruned.repeat_interleave(rows, 0)
        for _ in range(SHARED_COLUMNS - pattern.n):
            _remove_one(work, blocks, pruned)
    wide = pruned.repeat_interleave(work.shape[1], 0)
    return Removal(wide, _solve_pull(weight, inverse, pruned, work.shape[1]))


def _remove_one(work: Tensor, blocks: Tensor, pruned: Tensor) -> None:
    """Removes one column of every set, in place: weights [sets, rows, g], inverses [sets, g, g]."""
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    costs = work.square().sum(1) / diagonal
    at = costs.masked_fill(pruned, math.inf).argmin(1)
    sets = torch.arange(len(at), device=at.device)
    line = blocks[sets, at]  # [sets, g]
    pivot = line[sets, at].view(-1, 1)
    work -= (work[sets, :, at] / pivot).unsqueeze(2) * line.unsqueeze(1)
    blocks -= line.unsqueeze(2) * (line / pivot).unsqueeze(1)
    blocks.diagonal(dim1=1, dim2=2)[sets, at] = 1.0
    pruned[sets, at] = True


def _solve_pull(weight: Tensor, inverse: Tensor, pruned: Tensor, rows: int) -> Tensor:
    """Returns ``pull`` of removed columns that are known: bool [sets of ``rows`` rows, g]."""
    columns = pruned.nonzero()[:, 1].view(len(pruned), -1)
    blocks = inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
    wide = columns.repeat_interleave(rows, 0)
    chosen = torch.unflatten(weight.gather(1, wide), 0, (-1, rows))
    solved = torch.linalg.solve_ex(blocks, chosen.mT)[0].mT.flatten(0, 1)
    return torch.zeros_like(weight).scatter_(1, wide, solved)
