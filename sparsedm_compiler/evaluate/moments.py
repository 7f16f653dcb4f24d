"""Means and covariances of features, accumulated batch by batch, and pytorch-fid's files of them.

Two parts merge as (Chan, Golub & LeVeque 1983), with D = mean_b - mean_a:
    mean = mean_a + D n_b / n        scatter = scatter_a + scatter_b + D D^T n_a n_b / n
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, DataError
from ..npz_archive import open_archive


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and scatter of a set of features, float64; two sets are merged by ``+``.

    Attributes:
        count: The number of features.
        mean: Their mean [d].
        scatter: The sum [d, d] of the outer products of their deviations from the mean.

    Example:
        >>> parts = torch.tensor([[1.0], [3.0], [8.0]]).split([2, 1])
        >>> whole = Moments.from_features(parts[0]) + Moments.from_features(parts[1])
        >>> whole.count, whole.mean.item(), whole.to_statistics().covariance.item()
        (3, 4.0, 13.0)
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def from_features(features: Tensor) -> Moments:
        """Returns the moments of features [n, d], n >= 1."""
        values = features.detach().double().cpu()
        mean = values.mean(0)
        deviations = values - mean
        return Moments(len(values), mean, deviations.T @ deviations)

    @staticmethod
    def empty(width: int) -> Moments:
        """Returns the moments of zero features of that width."""
        zero = torch.zeros(width, dtype=torch.float64, device="cpu")
        return Moments(0, zero, torch.zeros(width, width, dtype=torch.float64, device="cpu"))

    def __add__(self, other: Moments) -> Moments:
        """Returns the moments of both sets together. Raises DataError where their widths differ."""
        if self.mean.shape != other.mean.shape:
            raise DataError(
                f"features of widths {len(self.mean)} and {len(other.mean)} make no one set"
            )
        if 0 in (self.count, other.count):
            return self if other.count == 0 else other
        count = self.count + other.count
        shift = other.mean - self.mean
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        mean = self.mean + shift * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def to_statistics(self, network: str | None = None) -> Statistics:
        """Returns the Gaussian fitted to the features, under the name of their ``network``.

        Raises DataError for fewer than 2 features, NaN and Inf.
        """
        if self.count < 2:
            raise DataError(f"{self.count} images have no covariance; give at least 2")
        covariance = self.scatter / (self.count - 1)
        return Statistics(self.mean.numpy(), covariance.numpy(), self.count, network)


@dataclass(frozen=True, slots=True)
class Statistics:
    """A Gaussian fitted to features, which is all that a Fréchet distance needs of images.

    Attributes:
        mean: The mean [d], float64.
        covariance: The covariance [d, d], float64.
        count: The number of images, None where a file does not say.
        network: The name of the feature network, None where a file does not say.

    Raises:
        DataError: The shapes are not [d] and [d, d], or there are NaN or Inf.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    network: str | None = None

    def __post_init__(self) -> None:
        shapes = list(self.mean.shape), list(self.covariance.shape)
        if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
            raise DataError(f"mean {shapes[0]} and covariance {shapes[1]} are not [d] and [d, d]")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise DataError(
                "features hold NaN or Inf: the samples or the feature network are broken"
            )


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Writes statistics as pytorch-fid does, in an .npz with the arrays mu and sigma.

    The count and the network's name are stored beside them; pytorch-fid ignores both.

    Args:
        path: The file to write; its folder is made.
        statistics: The statistics to write.

    Raises:
        CheckpointError: The file cannot be written.
    """
    path = Path(path)
    extras: dict[str, Any] = {}
    if statistics.count is not None:
        extras["count"] = statistics.count
    if statistics.network is not None:
        extras["network"] = statistics.network
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, mu=statistics.mean, sigma=statistics.covariance, **extras)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def load_statistics(path: str | Path) -> Statistics:
    """Reads statistics from an .npz of ``save_statistics`` or of pytorch-fid.

    Args:
        path: The file to read.

    Returns:
        The statistics; a file of pytorch-fid has neither count nor network.

    Raises:
        DataError: The file cannot be read, has no mu and sigma, or holds NaN or Inf.
    """
    with open_archive(Path(path), "the statistics ") as archive:
        arrays = dict(archive)
    if not {"mu", "sigma"} <= {*arrays}:
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'nothing'} where statistics of pytorch-fid hold "
            "mu and sigma"
        )
    try:
        count = int(arrays["count"]) if "count" in arrays else None
        mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot read the statistics {path}: {error}") from error
    network = str(arrays["network"]) if "network" in arrays else None
    return Statistics(mean, covariance, count, network)
