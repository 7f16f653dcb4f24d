"""The kernel distance (KID, Binkowski et al. 2018) between two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.predict import generator_at
from ..errors import ConfigError
from .frechet import check_features


def kernel_distance(
    features_a: Tensor,
    features_b: Tensor,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Computes the kernel distance (KID, Binkowski et al. 2018): squared MMD over random subsets.

    The kernel is k(x, y) = (x . y / d + 1)^3. The estimate is unbiased, so it may be negative.

    Args:
        features_a: Features [n, d], n >= 2.
        features_b: Features [m, d], m >= 2, of the same network.
        subsets: The number of random subsets to average over.
        size: Rows drawn from either set for a subset; at most those of the smaller set.
        seed: The seed that the subsets are drawn by.

    Returns:
        The mean over the subsets, and their standard deviation.

    Raises:
        DataError: The features have different widths, fewer than 2 rows, NaN or Inf.
        ConfigError: ``subsets`` is below 1 or ``size`` below 2.

    Example:
        >>> same = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
        >>> kernel_distance(same, same + 1, subsets=1)[0] > 0
        True
    """
    check_features(features_a, features_b, at_least=2)
    if subsets < 1 or size < 2:
        raise ConfigError(f"{subsets} subsets of {size}: give at least 1 subset of at least 2")
    size = min(size, len(features_a), len(features_b))
    estimates = []
    for subset in range(subsets):
        samples = []
        for label, features in (("ours", features_a), ("theirs", features_b)):
            generator = generator_at(seed, "KID", subset, label)
            order = torch.randperm(len(features), generator=generator, device="cpu")
            samples.append(features[order[:size]].double())
        estimates.append(squared_mmd(*samples))
    values = torch.tensor(estimates, dtype=torch.float64, device="cpu")
    return values.mean().item(), values.std(correction=0).item()


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Computes the unbiased squared MMD of ``a`` and ``b``, [m, d] both (Gretton et al. 2012).

    mean k(a, a') over a != a' + mean k(b, b') over b != b' - 2 mean k(a, b)
    """
    count = len(a)
    within = 0.0
    for x in (a, b):
        values = kernel(x, x)
        within += (values.sum() - values.trace()).item() / (count * (count - 1))
    return within - 2 * kernel(a, b).mean().item()


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Computes (x . y / d + 1)^3 for every row x of ``a`` and y of ``b``."""
    return (a @ b.T / a.shape[1] + 1) ** 3
