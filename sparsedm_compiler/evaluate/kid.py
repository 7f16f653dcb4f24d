"""The kernel distance (KID, Binkowski et al. 2018) between two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.predict import generator_at
from ..errors import ConfigError
from .frechet import check_pair


def kernel_distance(
    features_a: Tensor,
    features_b: Tensor,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation of the squared MMD over ``subsets`` of ``size`` features a side.

    The kernel is k(x, y) = (x . y / d + 1)^3 and the estimate unbiased, so it may be negative.
    Where either set [n, d] has fewer than ``size`` features, subsets are as large as the smaller.
    Raises DataError for features that do not fit, are fewer than 2, or hold NaN or Inf.

    >>> same = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
    >>> kernel_distance(same, same + 1, subsets=1)[0] > 0
    True
    """
    check_pair(features_a, features_b, at_least=2)
    if subsets < 1 or size < 2:
        raise ConfigError(f"{subsets} subsets of {size}: give at least 1 subset of at least 2")
    size = min(size, len(features_a), len(features_b))
    found = []
    for subset in range(subsets):
        sides = []
        for side, given in (("ours", features_a), ("theirs", features_b)):
            order = torch.randperm(len(given), generator=generator_at(seed, "KID", subset, side))
            sides.append(given[order[:size]].double())
        found.append(squared_mmd(*sides))
    values = torch.tensor(found, dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """mean k(a, a') over a != a' + mean k(b, b') over b != b' - 2 mean k(a, b), for [m, d] each."""
    count = len(a)
    within = 0.0
    for side in (a, b):
        values = kernel(side, side)
        within += (values.sum() - values.trace()).item() / (count * (count - 1))
    return within - 2 * kernel(a, b).mean().item()


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """(x . y / d + 1)^3 for every row x of ``a`` and y of ``b``."""
    return (a @ b.T / a.shape[1] + 1) ** 3
