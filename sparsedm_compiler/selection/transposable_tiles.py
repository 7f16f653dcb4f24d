"""Transposable masks: the best mask of every 4x4 tile that keeps n in each row and each column.

The best mask keeps the largest sum of magnitudes (Hubara et al. 2021), and the optimum is exact.
Legal masks are never listed one by one: the better order of two choices for two rows does not
depend on the other rows, so that 27 sums (of 2:4) decide among 90 masks.
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
"""Bits of the fraction, bias of the exponent, and bits of units: sums of 12 must not overflow."""

_CPU_TILES, _DEVICE_TILES = 1 << 11, 1 << 17
"""Tiles, of 1 kB each, that a CPU or an accelerator works on at a time.

With more on a CPU, the allocator returns the pages to the system at every step, which can triple
the time (benchmarks/masks.py).
"""

Pair = tuple[int, int]


def select_tiles(weight: Tensor, n: int) -> Tensor:
    """Returns the transposable n:4 mask of a weight, by 27 integer sums per tile.

    Magnitudes are counted in whole units: 2^27 of them (2^58 in float64) make the power of two
    above the tile's largest; a magnitude below one unit counts as one, zero as none. So a float32
    of at least an eighth of the largest counts exactly and others to one unit, sums are exact in
    any order, every device computes the same mask, and a weight whose zeros fit a legal mask keeps
    all its non-zeros. Of equal sums the first wins: by the choices of the upper two rows, lowest
    columns first, then of the lower two, then by their order. NaN and Inf count as the same, above
    every number of their tile.

    Args:
        weight: [out, in] or [out, in, *kernel], detached; ``out`` and ``in`` are multiples of 4.
            Tiles lie over (out, in) at every kernel position.
        n: Weights that each row and each column of a tile keeps: 1, 2 or 3.

    Returns:
        A bool tensor of the shape of ``weight``, True where a weight is kept.

    Example:
        >>> select_tiles(torch.eye(4), 1).int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    """
    mask = torch.empty_like(weight, dtype=torch.bool)
    if weight.numel() == 0:
        return mask
    plan = build_plan(n, weight.device)
    size = _CPU_TILES if weight.device.type == "cpu" else _DEVICE_TILES
    step = max(1, size * TILE * TILE // weight[:TILE].numel()) * TILE
    for part, marked in zip(torch.split(weight, step), torch.split(mask, step), strict=True):
        tiles = _split_tiles(part)
        wide = torch.promote_types(part.dtype, torch.float32)
        magnitudes = torch.empty(tiles.shape, dtype=wide, device=part.device)
        magnitudes.copy_(tiles).abs_()
        best = _pick_best(_count_units(magnitudes.view(TILE * TILE, -1)), plan)
        _split_tiles(marked).copy_(plan.masks.index_select(0, best).T.view(tiles.shape))
    return mask


def _split_tiles(tensor: Tensor) -> Tensor:
    """Views [out, in, ...] as [4, 4, out / 4, in / 4, ...]."""
    cut = torch.unflatten(torch.unflatten(tensor, 1, (-1, TILE)), 0, (-1, TILE))
    return cut.movedim((1, 3), (0, 1))


def _count_units(magnitudes: Tensor) -> Tensor:
    """Returns the magnitudes [16, tiles] in whole units of their tile."""
    fraction, bias, top = _FORMATS[magnitudes.dtype]
    bits = magnitudes.view(KEYS[magnitudes.dtype])
    exponent = (top + 2 * bias - 1) - (bits.amax(0) >> fraction)
    scale = exponent.clamp_(max=2 * bias).bitwise_left_shift_(fraction).view(magnitudes.dtype)
    most = float(1 << top)
    units = torch.nan_to_num(magnitudes * scale, nan=most, posinf=most).to(bits.dtype)
    return torch.maximum(units, bits.clamp(max=1), out=units)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The operands of every sum, as indices into the sums of the step before.

    A half is two rows of a tile, a lane a pair of halves that together keep n in every column.

    Attributes:
        columns: For each row of a tile and each choice of n columns, the columns.
        straight: For each half and each pair of choices, the first choice in the upper row and the
            second in the lower.
        crossed: The same with the second choice in the upper row.
        halves: For each lane, its upper and its lower half.
        order: The number of each lane.
        masks: Four masks of each lane, with the upper and the lower half straight or crossed.
    """

    columns: tuple[Tensor, ...]
    straight: tuple[Tensor, ...]
    crossed: tuple[Tensor, ...]
    halves: Tensor
    order: Tensor
    masks: Tensor


def _pick_best(units: Tensor, plan: _Plan) -> Tensor:
    """Returns [tiles]: the index of the one of ``plan.masks`` that keeps most of the units.

    units: [16, tiles].
    """
    rows = _sum_lanes(units, plan.columns)
    straight, crossed = _sum_lanes(rows, plan.straight), _sum_lanes(rows, plan.crossed)
    sums = _sum_lanes(torch.maximum(straight, crossed), plan.halves.unbind())
    worse = torch.lt(sums, sums.amax(0), out=sums)
    lane = worse.mul_(len(plan.order)).add_(plan.order).amin(0)
    at = plan.halves.index_select(1, lane)
    upper, lower = crossed.gather(0, at) > straight.gather(0, at)
    return torch.add(lane * 4 + lower, upper, alpha=2)


def _sum_lanes(lanes: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    """Returns the sums of the lanes at those indices."""
    out = lanes.index_select(0, operands[0])
    for indices in operands[1:]:
        out += lanes.index_select(0, indices)
    return out


@lru_cache(maxsize=64)
def build_plan(n: int, device: torch.device) -> _Plan:
    """Returns the plan of n:4 masks, with its tensors on a device."""
    choices, pairs, lanes = _list_choices(n)

    def index_choices(row: int, which: int) -> Tensor:
        """Returns the index of the first or second choice of every pair in a row of both halves."""
        return torch.tensor(
            [len(choices) * (2 * half + row) + pair[which] for half in (0, 1) for pair in pairs],
            device=device,
        )

    columns = [[TILE * r + kept[k] for r in range(TILE) for kept in choices] for k in range(n)]
    halves = [[pairs.index(up), len(pairs) + pairs.index(low)] for up, low in lanes]
    return _Plan(
        tuple(torch.tensor(indices, device=device) for indices in columns),
        (index_choices(0, 0), index_choices(1, 1)),
        (index_choices(1, 0), index_choices(0, 1)),
        torch.tensor(halves, device=device).T.contiguous(),
        torch.arange(len(lanes), dtype=torch.int32, device=device).unsqueeze(1),
        torch.tensor(_list_masks(n), dtype=torch.bool, device=device).view(-1, TILE * TILE),
    )


def _list_choices(n: int) -> tuple[list[tuple[int, ...]], list[Pair], list[tuple[Pair, Pair]]]:
    """Returns the choices of n columns, the pairs of choices of two rows, and those of all four."""
    choices = list(combinations(range(TILE), n))
    pairs = list(combinations_with_replacement(range(len(choices)), 2))
    level = sorted(n * [*range(TILE)])
    lanes = [
        (upper, lower)
        for upper in pairs
        for lower in pairs
        if sorted(chain.from_iterable(choices[choice] for choice in upper + lower)) == level
    ]
    return choices, sorted({upper for upper, _ in lanes}), lanes


def _list_masks(n: int) -> list[list[list[bool]]]:
    """Returns all masks as rows of booleans: 4 of each lane, halves straight (0) or crossed (1)."""
    choices, _, lanes = _list_choices(n)
    ways = [
        (*upper[::up], *lower[::low]) for upper, lower in lanes for up in (1, -1) for low in (1, -1)
    ]
    return [[[c in choices[row] for c in range(TILE)] for row in way] for way in ways]
