"""``score_images``: a stream of images against a reference, by every metric that was asked for."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion.image_batches import CHUNK, ImageSource, image_batches, iterate_chunks
from ..errors import ConfigError, DataError
from .features import Collected, FeatureNetwork, collect
from .frechet import gaussian_distance
from .kid import kernel_distance
from .moments import Statistics, load_statistics
from .precision_recall import precision_recall
from .process_group import gathered, own_share, total_moments
from .score import Score


@dataclass(frozen=True, slots=True)
class Metrics:
    """What to compute beside the Fréchet distance, on the first ``stored`` images of either side.

    ``kid``: mean over ``subsets`` of ``subset_size``. ``precision_recall``: with ``neighbours``.
    Raises ConfigError for numbers that cannot be.
    """

    kid: bool = False
    precision_recall: bool = False
    stored: int = 10_000
    subsets: int = 100
    subset_size: int = 1000
    neighbours: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"stored": 2, "subsets": 1, "subset_size": 2, "neighbours": 1}
        values = {"stored": self.stored, "subsets": self.subsets, "subset_size": self.subset_size}
        for name, value in {**values, "neighbours": self.neighbours}.items():
            if value < least[name]:
                raise ConfigError(f"{name} {value} of Metrics is not >= {least[name]}")

    @property
    def keep(self) -> int:
        """How many features must be stored: none for a Fréchet distance alone."""
        return self.stored if self.kid or self.precision_recall else 0


@dataclass(frozen=True, slots=True)
class Known:
    """One side of a score: the statistics of all its images and the ``stored`` features [n, d]."""

    statistics: Statistics
    stored: Tensor


Reference = Known | ImageSource | Tensor | str | Path
"""Images, a folder of them, a file of statistics (.npz), or what ``reference_of`` made of them."""


def score_images(
    network: FeatureNetwork,
    batches: Iterable[tuple[range, Tensor]],
    *,
    reference: Reference,
    sampler: str,
    metrics: Metrics | None = None,
) -> tuple[Score, ...]:
    """The Fréchet distance between ``batches`` and ``reference``, then what ``metrics`` asks for.

    ``batches``: numbers and images in [-1, 1], as ``sample_batches`` or ``image_batches`` yield
    them; among several processes each gives its share, and all get the scores. Images count as
    their PNGs would. Raises DataError for too few images, NaN features, or a reference that does
    not fit; ConfigError where a file of statistics is asked for more than a Fréchet distance.
    """
    metrics = metrics or Metrics()
    theirs = reference_of(network, reference, keep=metrics.keep)
    ours = known(network, batches, metrics.keep)
    say_few(network, ours.statistics, theirs.statistics)
    count = ours.statistics.count
    assert count is not None, "moments count their images"
    value = gaussian_distance(ours.statistics, theirs.statistics)
    first = Score(value, network.name, count, theirs.statistics.count, sampler)
    return (first, *stored_scores(first, ours.stored, theirs.stored, metrics))


def stored_scores(like: Score, ours: Tensor, theirs: Tensor, metrics: Metrics) -> Iterator[Score]:
    """What ``metrics`` asks for of stored features [n, d], named as ``like``."""
    base = replace(like, count=len(ours), reference_count=len(theirs))
    if metrics.kid:
        value, spread = kernel_distance(
            ours, theirs, subsets=metrics.subsets, size=metrics.subset_size, seed=metrics.seed
        )
        yield replace(base, metric="KID", value=value, spread=spread)
    if metrics.precision_recall:
        precision, recall = precision_recall(ours, theirs, k=metrics.neighbours)
        yield replace(base, metric="precision", value=precision)
        yield replace(base, metric="recall", value=recall)


def reference_of(
    network: FeatureNetwork, reference: Reference, *, keep: int = 0, progress: bool = True
) -> Known:
    """What ``score_images`` must know of a reference, to be computed once for many scores.

    ``keep``: features to store for KID, precision and recall (``Metrics.keep``). Raises DataError
    and ConfigError.
    """
    if isinstance(reference, Known):
        if len(reference.stored) < min(keep, reference.statistics.count or keep):
            raise ConfigError(
                f"KID, precision and recall need {keep} features of the reference, which stored "
                f"{len(reference.stored)}: make it with reference_of(..., keep={keep})"
            )
        return reference
    if isinstance(reference, str | Path):
        if is_statistics(Path(reference)):
            return from_file(network, Path(reference), keep)
        from ..data import open_data

        reference = open_data(str(reference), labels=False)
    share = own_share()
    seen = tqdm(
        image_batches(reference, share=share),
        desc=f"{network.name} features",
        total=sum(1 for _ in iterate_chunks(len(reference), CHUNK, share)),
        unit="batch",
        disable=share[0] > 0 or not progress,
    )
    return known(network, seen, keep)


def is_statistics(path: Path) -> bool:
    """Whether ``path`` is an .npz with a mean and a covariance, rather than with images."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as found:
        return "mu.npy" in found.namelist()


def from_file(network: FeatureNetwork, path: Path, keep: int) -> Known:
    """The statistics in ``path``. Raises ConfigError where they are asked for more."""
    if keep:
        raise ConfigError(
            f"{path} holds statistics and no features: KID, precision and recall need the images "
            "of the reference"
        )
    found = load_statistics(path)
    if found.network not in (None, network.name):
        raise DataError(
            f"{path} holds statistics of {found.network}, not of {network.name}: use that network, "
            "or make the statistics again"
        )
    return Known(found, torch.zeros(0, len(found.mean)))


def known(network: FeatureNetwork, batches: Iterable[tuple[range, Tensor]], keep: int) -> Known:
    """What the batches of all processes come to, the stored features in the order of the images."""
    own = collect(network, batches, stored=keep)
    moments = total_moments(own.moments)
    if moments is None:
        raise DataError(f"there are no images to take {network.name} features of")
    return Known(moments.statistics(network.name), stored(own))


def stored(own: Collected) -> Tensor:
    """The stored features of all processes by image number."""
    parts = [part for part in gathered((own.numbers, own.stored)) if len(part[0])]
    if not parts:
        return own.stored
    order = torch.cat([numbers for numbers, _ in parts]).argsort()
    return torch.cat([found for _, found in parts])[order]


def say_few(network: FeatureNetwork, ours: Statistics, theirs: Statistics) -> None:
    """Print, on the first process, that there are fewer images than features, where so."""
    few = min(count for count in (ours.count, theirs.count) if count is not None)
    if few < len(ours.mean) and own_share()[0] == 0:
        print(
            f"note: {few} images are fewer than the {len(ours.mean)} features of {network.name}, "
            "which makes the Fréchet distance larger: compare it at equal counts only"
        )
