"""Detection of the N:M pattern that the zeros of a weight already satisfy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..patterns import NM, Pattern, SharedNM

_GROUP_SIZES = (2, 4, 8, 16, 32, 64)
_SHARED_ROWS = (128, 64, 32, 16, 8, 4, 2)


def detect_pattern(weight: Tensor) -> Pattern | None:
    """Returns the sparsest N:M pattern that keeps every non-zero of a weight.

    Groups of 2, 4, 8, 16, 32 and 64 are tried. Of equally sparse patterns the one with the
    smallest groups is returned. If 2, 4, ... or 128 consecutive rows have their zeros in the same
    columns, the pattern shares its mask among the largest such number of rows.

    Args:
        weight: [out, in] or [out, in, *kernel]; groups run along ``in``.

    Returns:
        An ``NM`` or a ``SharedNM`` pattern. None if the zeros satisfy no pattern, if nothing is
        zero or everything is, and for a meta tensor, a fake tensor or a tensor of one dimension.

    Example:
        >>> detect_pattern(torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0]]))
        NM(n=2, m=4)
    """
    if weight.dim() < 2 or weight.is_meta or isinstance(weight, FakeTensor):
        return None
    kept = (weight.detach() != 0).movedim(1, -1)
    width, candidates = kept.shape[-1], list[NM]()
    for m in _GROUP_SIZES:
        if width % m == 0:
            n = int(kept.reshape(-1, m).sum(1).max()) if kept.numel() else 0
            if 0 < n < m:
                candidates.append(NM(n, m))
    if not candidates:
        return None
    best = min(candidates, key=lambda pattern: (pattern.density, pattern.m))
    flat = kept.flatten(1)
    for rows in _SHARED_ROWS:
        if flat.shape[0] % rows == 0:
            blocks = flat.view(-1, rows, flat.shape[1])
            if torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
                return SharedNM(best.n, best.m, rows)
    return best


def detect_patterns(weights: Iterable[tuple[str, Tensor]]) -> tuple[tuple[str, Pattern], ...]:
    """Returns (name, pattern) of those of the named weights that satisfy a pattern."""
    patterns = ((name, detect_pattern(weight)) for name, weight in weights)
    return tuple((name, pattern) for name, pattern in patterns if pattern is not None)
