"""Tiles: of every 4x4 tile of a weight, the best mask that keeps n in each row and each column.

Transposable masks, Hubara et al. 2021: "best" keeps the largest sum of magnitudes, and the optimum
is exact. Legal masks are never listed one by one: the better order of two choices for two rows is
known without the other rows, so that 27 sums (of 2:4) do for 90 masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations, combinations_with_replacement

import torch
from torch import Tensor

from .top_n import KEYS

TILE = 4
"""Rows and columns of the tiles that a transposable mask is made of (Hubara et al. 2021)."""

_FORMATS = {torch.float32: (23, 127, 27), torch.float64: (52, 1023, 58)}
"""Bits of the fraction, bias of the exponent, and of units: sums of 12 must not overflow."""

_CACHED, _AT_ONCE = 1 << 11, 1 << 17
"""Tiles that a CPU or an accelerator is given at a time, 1 kB each. Of more on a CPU, the allocator
returns the pages to the system at every step, which can triple the time (benchmarks/masks.py)."""

Pair = tuple[int, int]


def select_tiles(weight: Tensor, n: int) -> Tensor:
    """The transposable n:4 mask of a weight whose tiles fit, by 27 integer sums per tile.

    weight: [out, in] or [out, in, *kernel]; tiles lie over (out, in) at every kernel position.
    Magnitudes are counted in whole units: 2^27 of them (2^58 in float64) make the power of two
    above the tile's largest; what is less than one unit counts as one, zero as none. So a float32
    of at least an eighth of the largest counts exactly and others to one unit, sums are exact in
    any order, every device finds the same mask, and a weight whose zeros fit a legal mask keeps
    all it has. Of equal sums the first wins: by the choices of the upper two rows, lowest columns
    first, then of the lower two, then by their order. NaN and Inf count as the same, above every
    number of their tile.
    """
    mask = torch.empty_like(weight, dtype=torch.bool)
    if weight.numel() == 0:
        return mask
    plan = _plan(n, weight.device)
    size = _CACHED if weight.device.type == "cpu" else _AT_ONCE
    step = max(1, size * TILE * TILE // weight[:TILE].numel()) * TILE
    for part, marked in zip(torch.split(weight, step), torch.split(mask, step), strict=True):
        tiles = _tiled(part)
        wide = torch.promote_types(part.dtype, torch.float32)
        magnitudes = torch.empty(tiles.shape, dtype=wide, device=part.device)
        magnitudes.copy_(tiles).abs_()
        best = _best(_units(magnitudes.view(TILE * TILE, -1)), plan)
        _tiled(marked).copy_(plan.masks.index_select(0, best).T.view(tiles.shape))
    return mask


def _tiled(tensor: Tensor) -> Tensor:
    """[out, in, ...] -> [4, 4, out / 4, in / 4, ...], a view."""
    cut = torch.unflatten(torch.unflatten(tensor, 1, (-1, TILE)), 0, (-1, TILE))
    return cut.movedim((1, 3), (0, 1))


def _units(magnitudes: Tensor) -> Tensor:
    """[16, tiles]: the magnitudes in whole units of their tile."""
    fraction, bias, top = _FORMATS[magnitudes.dtype]
    bits = magnitudes.view(KEYS[magnitudes.dtype])
    exponent = (top + 2 * bias - 1) - (bits.amax(0) >> fraction)
    scale = exponent.clamp_(max=2 * bias).bitwise_left_shift_(fraction).view(magnitudes.dtype)
    most = float(1 << top)
    units = torch.nan_to_num(magnitudes * scale, nan=most, posinf=most).to(bits.dtype)
    return torch.maximum(units, bits.clamp(max=1), out=units)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is added to what: places among the sums of the step before.

    ``columns``: for each row of a tile and each choice of n columns, the columns. ``straight``: for
    each half of a tile (two rows) and each pair of choices, the first in the upper row, the second
    in the lower; ``crossed``: the other way round. ``halves``: for each lane, two halves whose
    columns add up. ``order``: the number of each lane. ``masks``: of each lane, with the upper and
    the lower half straight or crossed.
    """

    columns: tuple[Tensor, ...]
    straight: tuple[Tensor, ...]
    crossed: tuple[Tensor, ...]
    halves: Tensor
    order: Tensor
    masks: Tensor


def _best(units: Tensor, plan: _Plan) -> Tensor:
    """[tiles]: which of ``plan.masks`` keeps most of the ``units`` [16, tiles]."""
    rows = _added(units, plan.columns)
    straight, crossed = _added(rows, plan.straight), _added(rows, plan.crossed)
    sums = _added(torch.maximum(straight, crossed), plan.halves.unbind())
    worse = torch.lt(sums, sums.amax(0), out=sums)
    lane = worse.mul_(len(plan.order)).add_(plan.order).amin(0)
    at = plan.halves.index_select(1, lane)
    upper, lower = crossed.gather(0, at) > straight.gather(0, at)
    return torch.add(lane * 4 + lower, upper, alpha=2)


def _added(lanes: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """The sums of the lanes at those places."""
    out = lanes.index_select(0, places[0])
    for each in places[1:]:
        out += lanes.index_select(0, each)
    return out


@lru_cache(maxsize=64)
def _plan(n: int, device: torch.device) -> _Plan:
    choices, pairs, lanes = _legal(n)

    def places(row: int, which: int) -> Tensor:
        """The first or second choice of every pair, in that row of either half."""
        return torch.tensor(
            [len(choices) * (2 * half + row) + pair[which] for half in (0, 1) for pair in pairs],
            device=device,
        )

    columns = [[TILE * r + kept[k] for r in range(TILE) for kept in choices] for k in range(n)]
    halves = [[pairs.index(up), len(pairs) + pairs.index(low)] for up, low in lanes]
    return _Plan(
        tuple(torch.tensor(each, device=device) for each in columns),
        (places(0, 0), places(1, 1)),
        (places(1, 0), places(0, 1)),
        torch.tensor(halves, device=device).T.contiguous(),
        torch.arange(len(lanes), dtype=torch.int32, device=device).unsqueeze(1),
        torch.tensor(_masks(n), dtype=torch.bool, device=device).view(-1, TILE * TILE),
    )


def _legal(n: int) -> tuple[list[tuple[int, ...]], list[Pair], list[tuple[Pair, Pair]]]:
    """The choices of n columns, the pairs of choices two rows can make, and those of all four."""
    choices = list(combinations(range(TILE), n))
    pairs = list(combinations_with_replacement(range(len(choices)), 2))
    level = sorted(n * [*range(TILE)])
    lanes = [
        (upper, lower)
        for upper in pairs
        for lower in pairs
        if sorted(chain.from_iterable(choices[each] for each in upper + lower)) == level
    ]
    return choices, sorted({upper for upper, _ in lanes}), lanes


def _masks(n: int) -> list[list[list[bool]]]:
    """All masks, rows of booleans: 4 of each lane, its halves straight (0) or crossed (1)."""
    choices, _, lanes = _legal(n)
    ways = [
        (*upper[::up], *lower[::low]) for upper, lower in lanes for up in (1, -1) for low in (1, -1)
    ]
    return [[[c in choices[each] for c in range(TILE)] for each in way] for way in ways]
