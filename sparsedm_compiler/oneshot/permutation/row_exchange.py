"""Exchanges of columns under per-row N:M, without a mask for every one of them.

With column i taken out of its group, a row keeps S_i, the n largest squares of the others, of which
the smallest is t_i. With x in its place it keeps ``S_i + max(0, x^2 - t_i)``. So S and t of every
column are computed once for all columns that may come.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...patterns import NM, Pattern
from .arrangement import Places, View

CHUNK = 1 << 22
"""Numbers that are worked on at a time."""


def is_per_row(view: View) -> bool:
    """Returns whether a view is of columns under per-row N:M, one for every channel."""
    return view.dim == 1 and isinstance(view.weight.pattern, NM) and len(view.indices) == 1


def measure_exchanges(
    view: View,
    lines: tuple[Places, Places],
    at: tuple[Places, Places],
    which: tuple[Places, Places],
) -> NDArray[np.float64]:
    """Returns the kept energy of pairs of units after exchanges, as a share of the weight's.

    Args:
        view: A view for which ``is_per_row`` holds.
        lines: Of the first and second units, [pairs, lines]: the columns that they hold now.
        at: Of the same, [pairs, places]: where the places are among those.
        which: The exchanges, places of the first and of the second unit, [exchanges] each.

    Returns:
        [2, pairs, exchanges]: of the first and of the second units.
    """
    scores = view.weight.scores
    squares = scores.square().movedim(1, -1).reshape(-1, scores.shape[1])
    step = max(1, CHUNK // (len(squares) * max(len(which[0]), lines[0].shape[1])))
    parts = []
    for start in range(0, len(lines[0]), step):
        part = slice(start, start + step)
        held = [squares[:, torch.from_numpy(own[part]).to(squares.device)] for own in lines]
        spots = [
            torch.from_numpy(own[part][:, places]).to(squares.device)
            for own, places in zip(at, which, strict=True)
        ]
        parts.append(
            torch.stack(
                [
                    _bring(held[0], spots[0], held[1], spots[1], view.weight.pattern),
                    _bring(held[1], spots[1], held[0], spots[0], view.weight.pattern),
                ]
            )
        )
    total: NDArray[np.float64] = (torch.cat(parts, 1) * view.scale).cpu().numpy()
    return total


def _bring(own: Tensor, out: Tensor, other: Tensor, incoming: Tensor, pattern: Pattern) -> Tensor:
    """Returns the energy of units in which one column is replaced by one of other units.

    own, other: squares [rows, units, lines]; out, incoming: [units, exchanges], among the lines.
    Returns float64 [units, exchanges].
    """
    groups = own.view(*own.shape[:2], -1, pattern.m)
    largest = groups.topk(pattern.n + 1, dim=3)[0]
    kept = largest[..., : pattern.n].sum(3)
    smallest, after = largest[..., pattern.n - 1 : pattern.n], largest[..., pattern.n :]
    inside = groups >= smallest
    left = torch.where(inside, kept.unsqueeze(3) - groups + after, kept.unsqueeze(3)).flatten(2)
    least = torch.where(inside, after, smallest).flatten(2)
    base = left.sum(0, dtype=torch.float64)
    whole = kept.sum((0, 2), dtype=torch.float64)
    by_group = kept.sum(0, dtype=torch.float64).repeat_interleave(pattern.m, 1)
    index = out.unsqueeze(0).expand(len(own), -1, -1)
    arriving = other.gather(2, incoming.unsqueeze(0).expand(len(own), -1, -1))
    gained = arriving.sub_(least.gather(2, index)).clamp_(min=0).sum(0, dtype=torch.float64)
    energy: Tensor = whole.unsqueeze(1) - by_group.gather(1, out) + base.gather(1, out) + gained
    return energy
