"""Fréchet distances between Gaussians fitted to features, computed by pytorch-fid."""

from __future__ import annotations

import warnings

from torch import Tensor

from ..errors import DataError
from ..optional_deps import mend_torchvision
from .feature_network import Extractor
from .features import extract_features
from .moments import Moments, Statistics
from .score import Score


def frechet_score(
    network: Extractor, images: Tensor, reference: Tensor, *, name: str, sampler: str
) -> Score:
    """Scores images in memory by their Fréchet distance to reference images.

    ``score_images`` does the same for streams, folders and several processes.

    Args:
        network: A module or function from images [B, C, H, W] to features, as in
            ``FeatureNetwork``.
        images: The images to score [n, C, H, W], in [-1, 1].
        reference: The images to compare with [m, C, H, W], in [-1, 1].
        name: The name of the network in the score.
        sampler: A description of how ``images`` were made, for the score.

    Returns:
        The distance with network, counts and sampler.

    Raises:
        DataError: There are fewer than 2 images, or features of different widths, NaN or Inf.
    """
    ours, theirs = extract_features(network, images), extract_features(network, reference)
    return Score(frechet_distance(ours, theirs), name, len(ours), len(theirs), sampler)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Computes the Fréchet distance between Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)), Heusel et al. 2017. On features of
    InceptionV3 this is the FID. Compare values only at equal counts: fewer images give larger
    distances, all the more with fewer images than features.

    Args:
        features_a: Features [n, d], n >= 2.
        features_b: Features [m, d], m >= 2, of the same network.

    Returns:
        The distance, 0 or above up to rounding.

    Raises:
        DataError: The features have different widths, fewer than 2 rows, NaN or Inf; or the
            product of their covariances has no real square root.

    Example:
        >>> import torch
        >>> same = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
        >>> round(frechet_distance(same, same + torch.tensor([3.0, 4.0])), 3)
        25.0
    """
    check_features(features_a, features_b, at_least=2)
    pair = (Moments.from_features(features) for features in (features_a, features_b))
    return gaussian_distance(*(moments.to_statistics() for moments in pair))


def check_features(features_a: Tensor, features_b: Tensor, *, at_least: int) -> None:
    """Raises DataError unless both are finite features [n, d] of one width, n >= ``at_least``."""
    shapes = list(features_a.shape), list(features_b.shape)
    if features_a.ndim != 2 or features_b.ndim != 2 or shapes[0][1] != shapes[1][1]:
        raise DataError(f"features {shapes[0]} and {shapes[1]} are not [n, d] with one d")
    if min(shapes[0][0], shapes[1][0]) < at_least:
        raise DataError(f"features {shapes[0]} and {shapes[1]} need at least {at_least} rows each")
    if not (features_a.isfinite().all() and features_b.isfinite().all()):
        raise DataError("features hold NaN or Inf: the samples or the feature network are broken")


def gaussian_distance(a: Statistics, b: Statistics) -> float:
    """Computes |mean_a - mean_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)).

    Raises DataError for statistics of different widths, of networks with different names, or
    without a real root.
    """
    if a.mean.shape != b.mean.shape:
        raise DataError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared: use "
            "one feature network for both"
        )
    if None not in (a.network, b.network) and a.network != b.network:
        raise DataError(
            f"statistics of {a.network} and of {b.network} cannot be compared: use one feature "
            "network for both"
        )
    mend_torchvision()
    from pytorch_fid.fid_score import calculate_frechet_distance

    with warnings.catch_warnings():
        # scipy 1.17 announces the end of sqrtm(disp=), which pytorch-fid 0.3.0 passes, and
        # warns of the singular product that pytorch-fid itself looks for and mends.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*disp.*")
        warnings.filterwarnings("ignore", message="Matrix is singular")
        try:
            distance = calculate_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        except ValueError as error:
            raise DataError(
                f"the covariances of {len(a.mean)} features have no real root ({error}): give "
                "more images than features"
            ) from error
    return max(float(distance), 0.0)  # that of equal statistics is rounded to either side
