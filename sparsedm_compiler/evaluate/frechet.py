"""Fréchet distances on the features of any network, computed by pytorch-fid, named after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError
from ..models.optional import mend_torchvision
from .calling import evaluating


@dataclass(frozen=True, slots=True)
class FrechetScore:
    """A Fréchet distance together with everything it is not comparable without.

    ``network``: the feature network, as in "FD-DigitsCNN"; only InceptionV3 makes it a FID.
    ``count``/``reference_count``: images on either side. ``sampler``: how the images were made.
    """

    value: float
    network: str
    count: int
    reference_count: int
    sampler: str

    def __str__(self) -> str:
        return (
            f"FD-{self.network} {self.value:.3f} "
            f"({self.count} vs {self.reference_count} images, {self.sampler})"
        )


def frechet_score(
    network: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    reference: Tensor,
    *,
    name: str,
    sampler: str,
) -> FrechetScore:
    """The distance between the features of ``images`` and ``reference``, each [n, C, H, W].

    ``network`` turns [B, C, H, W] into features [B, ...]; ``name`` is what results call it.
    """
    ours, theirs = features(network, images), features(network, reference)
    return FrechetScore(frechet_distance(ours, theirs), name, len(ours), len(theirs), sampler)


def features(
    network: nn.Module | Callable[[Tensor], Tensor], images: Tensor, *, batch_size: int = 256
) -> Tensor:
    """The features [n, d] of ``images``, on the CPU; a module runs in eval mode on its device."""
    if not isinstance(network, nn.Module):
        return torch.cat(
            [network(part).flatten(1).cpu() for part in torch.split(images, batch_size)]
        )
    device = next((tensor.device for tensor in network.parameters()), images.device)
    with evaluating(network):
        parts = [network(part.to(device)) for part in torch.split(images, batch_size)]
    return torch.cat([part.flatten(1).cpu() for part in parts])


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """The Fréchet distance between Gaussians fitted to two sets of features [n, d].

    Compare values only at equal n: fewer images give larger distances, the more so below n = d.
    Raises DataError for features of different widths, fewer than 2 rows, or NaN and Inf.

    >>> same = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
    >>> round(frechet_distance(same, same + torch.tensor([3.0, 4.0])), 3)
    25.0
    """
    shapes = list(features_a.shape), list(features_b.shape)
    if features_a.ndim != 2 or features_b.ndim != 2 or shapes[0][1] != shapes[1][1]:
        raise DataError(f"features {shapes[0]} and {shapes[1]} are not [n, d] with one d")
    if min(shapes[0][0], shapes[1][0]) < 2:
        raise DataError(f"features {shapes[0]} and {shapes[1]} need at least 2 rows each")
    if not (features_a.isfinite().all() and features_b.isfinite().all()):
        raise DataError("features hold NaN or Inf: the samples or the feature network are broken")
    mend_torchvision()
    from pytorch_fid.fid_score import calculate_frechet_distance

    with warnings.catch_warnings():
        # scipy 1.17 announces the end of sqrtm(disp=), which pytorch-fid 0.3.0 passes, and
        # warns of the singular product that pytorch-fid itself looks for and mends.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*disp.*")
        warnings.filterwarnings("ignore", message="Matrix is singular")
        return float(calculate_frechet_distance(*moments(features_a), *moments(features_b)))


def moments(found: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] of features [n, d], in float64."""
    values = found.detach().double().cpu().numpy()
    return values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))
