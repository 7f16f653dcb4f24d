"""Means and covariances of features as they stream by, and the files pytorch-fid keeps them in.

Two parts merge as (Chan, Golub & LeVeque 1983), with D = mean_b - mean_a:
    mean = mean_a + D n_b / n        scatter = scatter_a + scatter_b + D D^T n_a n_b / n
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, DataError


@dataclass(frozen=True, slots=True)
class Moments:
    """Of ``count`` features the mean [d] and the summed squares of deviations [d, d], float64."""

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor) -> Moments:
        """The moments of features [n, d], n >= 1."""
        values = features.detach().double().cpu()
        mean = values.mean(0)
        away = values - mean
        return Moments(len(values), mean, away.T @ away)

    @staticmethod
    def none(width: int) -> Moments:
        """The moments of no features of that width."""
        zero = torch.zeros(width, dtype=torch.float64)
        return Moments(0, zero, torch.zeros(width, width, dtype=torch.float64))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together. Raises DataError where their widths differ."""
        if self.mean.shape != other.mean.shape:
            raise DataError(
                f"features of widths {len(self.mean)} and {len(other.mean)} make no one set"
            )
        if 0 in (self.count, other.count):
            return self if other.count == 0 else other
        count = self.count + other.count
        away = other.mean - self.mean
        between = torch.outer(away, away) * (self.count * other.count / count)
        mean = self.mean + away * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def statistics(self, network: str | None = None) -> Statistics:
        """The Gaussian fitted to the features. Raises DataError for fewer than 2, NaN and Inf."""
        if self.count < 2:
            raise DataError(f"{self.count} images have no covariance; give at least 2")
        covariance = self.scatter / (self.count - 1)
        return Statistics(self.mean.numpy(), covariance.numpy(), self.count, network)


@dataclass(frozen=True, slots=True)
class Statistics:
    """A Gaussian fitted to features: mean [d] and covariance [d, d], float64.

    ``count``: images behind it, ``network``: whose features; None where a file does not say.
    Raises DataError for shapes that do not fit, and for NaN and Inf.
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


def save_statistics(path: str | Path, found: Statistics) -> None:
    """Write ``found`` as pytorch-fid does (.npz with mu, sigma), and what it says beside that."""
    path = Path(path)
    beside: dict[str, Any] = {}
    if found.count is not None:
        beside["count"] = found.count
    if found.network is not None:
        beside["network"] = found.network
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, mu=found.mean, sigma=found.covariance, **beside)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def load_statistics(path: str | Path) -> Statistics:
    """The statistics in a file of ``save_statistics`` or pytorch-fid. Raises DataError."""
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as found:
            held = {name: found[name] for name in found.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read the statistics {path}: {error}") from error
    if not {"mu", "sigma"} <= {*held}:
        raise DataError(
            f"{path} holds {', '.join(held) or 'nothing'} where statistics of pytorch-fid hold mu "
            "and sigma"
        )
    count = int(held["count"]) if "count" in held else None
    network = str(held["network"]) if "network" in held else None
    mean, covariance = (np.asarray(held[name], np.float64) for name in ("mu", "sigma"))
    return Statistics(mean, covariance, count, network)
