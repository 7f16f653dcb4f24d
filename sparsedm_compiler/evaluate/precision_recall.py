"""Improved precision and recall (Kynkäänniemi et al. 2019): shares of one set within the other's.

The manifold of a set is the union of balls around its features that reach to the k-th neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .frechet import check_pair

CHUNK = 1024
SLACK = 1e-12


def precision_recall(features: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """The shares of ``features`` [n, d] near the reference, and of ``reference`` near ours.

    Precision falls with images that look like none of the reference, recall with kinds of images
    of the reference that are never made. Raises DataError for features that do not fit, are not
    more than ``k``, or hold NaN or Inf.

    >>> line = torch.arange(8.0)[:, None]
    >>> precision_recall(line[:6], line + 2, k=1)
    (0.8333333333333334, 0.625)
    """
    if k < 1:
        raise ConfigError(f"k = {k} is no neighbour; the first one is k = 1")
    check_pair(features, reference, at_least=k + 1)
    middle = reference.double().mean(0)
    x, y = features.double() - middle, reference.double() - middle
    slack = SLACK * torch.cat([x, y]).square().sum(1).max()
    ours, theirs = reach(x, k) + slack, reach(y, k) + slack
    inside, covered = (torch.zeros(len(side), dtype=torch.bool) for side in (x, y))
    for first in range(0, len(x), CHUNK):
        rows = slice(first, first + CHUNK)
        away = squared_distances(x[rows], y)
        inside[rows] = (away <= theirs).any(1)
        covered |= (away <= ours[rows, None]).any(0)
    return inside.double().mean().item(), covered.double().mean().item()


def reach(x: Tensor, k: int) -> Tensor:
    """The squared distance [n] from each row of ``x`` to its k-th nearest other one."""
    parts = torch.split(x, CHUNK)
    return torch.cat([squared_distances(part, x).kthvalue(k + 1, dim=1)[0] for part in parts])


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|x - y|^2 for every row x of ``a`` and y of ``b``, as |x|^2 + |y|^2 - 2 x . y.

    In float64 that is wrong by less than ``SLACK`` of the largest |x|^2, and far faster than
    differences.
    """
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)
