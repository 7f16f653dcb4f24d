"""Improved precision and recall (Kynkäänniemi et al. 2019): shares of one set within the other's.

The manifold of a set is the union of balls around its features that reach to the k-th neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .frechet import check_features

CHUNK = 1024
"""Rows whose distances to the whole other set are computed at once."""
SLACK = 1e-12
"""Rounding error of a squared distance, relative to the largest squared norm."""


def precision_recall(features: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Computes improved precision and recall (Kynkäänniemi et al. 2019).

    The manifold of a set is the union of balls around its features; a ball reaches to the k-th
    nearest other feature of its set. Precision falls with images unlike any of the reference,
    recall with kinds of reference images that are never generated.

    Args:
        features: Features of the images to score [n, d], n > k.
        reference: Features of the reference [m, d], m > k, of the same network.
        k: The neighbour that the radius of a ball reaches to.

    Returns:
        Precision, the share of ``features`` within the manifold of the reference; and recall, the
        share of ``reference`` within the manifold of ``features``.

    Raises:
        DataError: The features have different widths, k rows or fewer, NaN or Inf.
        ConfigError: ``k`` is below 1.

    Example:
        >>> line = torch.arange(8.0)[:, None]
        >>> precision_recall(line[:6], line + 2, k=1)
        (0.8333333333333334, 0.625)
    """
    if k < 1:
        raise ConfigError(f"k = {k} is no neighbour; the first one is k = 1")
    check_features(features, reference, at_least=k + 1)
    centre = reference.double().mean(0)
    x, y = features.double() - centre, reference.double() - centre
    slack = SLACK * torch.cat([x, y]).square().sum(1).max()
    radii_x, radii_y = squared_radii(x, k) + slack, squared_radii(y, k) + slack
    inside, covered = (torch.zeros(len(rows), dtype=torch.bool, device=x.device) for rows in (x, y))
    for first in range(0, len(x), CHUNK):
        rows = slice(first, first + CHUNK)
        distances = squared_distances(x[rows], y)
        inside[rows] = (distances <= radii_y).any(1)
        covered |= (distances <= radii_x[rows, None]).any(0)
    return inside.double().mean().item(), covered.double().mean().item()


def squared_radii(x: Tensor, k: int) -> Tensor:
    """Computes the squared distance [n] from every row of ``x`` to its k-th nearest other one."""
    parts = torch.split(x, CHUNK)
    return torch.cat([squared_distances(part, x).kthvalue(k + 1, dim=1)[0] for part in parts])


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Computes |x - y|^2 for every row x of ``a`` and y of ``b``, as |x|^2 + |y|^2 - 2 x . y.

    In float64 the error is below ``SLACK`` of the largest |x|^2, and this form is far faster than
    differences.
    """
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)
