"""weight -> the N:M pattern its zeros already satisfy, found by looking at every group."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..patterns import NM, Pattern, SharedNM

_GROUPS = (2, 4, 8, 16, 32, 64)
_SHARED = (128, 64, 32, 16, 8, 4, 2)


def detect_pattern(weight: Tensor) -> Pattern | None:
    """The sparsest pattern that keeps every non-zero of ``weight``, or None.

    weight: [out, in, ...]; groups run along in. Of equally sparse patterns the one with the
    smallest groups, shared by as many rows as have their zeros in the same places.

    >>> str(detect_pattern(torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0]])))
    '2:4'
    """
    if weight.dim() < 2 or weight.is_meta or isinstance(weight, FakeTensor):
        return None
    kept = (weight.detach() != 0).movedim(1, -1)
    width, found = kept.shape[-1], list[NM]()
    for m in _GROUPS:
        if width % m == 0:
            n = int(kept.reshape(-1, m).sum(1).max()) if kept.numel() else 0
            if 0 < n < m:
                found.append(NM(n, m))
    if not found:
        return None
    best = min(found, key=lambda pattern: (pattern.density, pattern.m))
    rows = kept.flatten(1)
    for share in _SHARED:
        if rows.shape[0] % share == 0:
            blocks = rows.view(-1, share, rows.shape[1])
            if torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
                return SharedNM(best.n, best.m, share)
    return best


def detect_patterns(weights: Iterable[tuple[str, Tensor]]) -> tuple[tuple[str, Pattern], ...]:
    """(name, pattern) of the weights that satisfy one."""
    found = ((name, detect_pattern(weight)) for name, weight in weights)
    return tuple((name, pattern) for name, pattern in found if pattern is not None)
