"""Scores a stream of images against a reference by the Fréchet distance and other metrics."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.image_batches import (
    CHUNK,
    ImageSource,
    NumberedBatches,
    image_batches,
    iterate_chunks,
)
from ..errors import ConfigError, DataError
from ..progress import ProgressBar, show_progress_bar
from .feature_network import FeatureNetwork
from .features import CollectedFeatures, collect_features
from .frechet import gaussian_distance
from .kid import kernel_distance
from .moments import Statistics, load_statistics
from .precision_recall import precision_recall
from .process_group import gather_objects, merge_moments, own_share
from .score import Score


@dataclass(frozen=True, slots=True)
class Metrics:
    """The metrics to compute beside the Fréchet distance, and their settings.

    Attributes:
        kid: Compute the kernel distance (KID) as well.
        precision_recall: Compute precision and recall as well.
        stored: Use the first ``stored`` images of either set for these metrics.
        subsets: Random subsets that the KID averages over.
        subset_size: Images in one of these subsets.
        neighbours: The k of precision and recall.
        seed: The seed that the subsets are drawn by.

    Raises:
        ConfigError: A number is below its least possible value.
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
        """The number of features to store: 0 for a Fréchet distance alone."""
        return self.stored if self.kid or self.precision_recall else 0


@dataclass(frozen=True, slots=True)
class FeatureSummary:
    """The features of a set of images, reduced to what scores need.

    Attributes:
        statistics: The Gaussian fitted to the features of all images.
        stored: The features [n, d] of the first images, for KID, precision and recall.
    """

    statistics: Statistics
    stored: Tensor


Reference = FeatureSummary | ImageSource | Tensor | str | Path
"""Images, a folder of them, a file of statistics (.npz), or a result of ``prepare_reference``."""


def score_images(
    network: FeatureNetwork,
    batches: Iterable[tuple[range, Tensor]],
    *,
    reference: Reference,
    sampler: str,
    metrics: Metrics | None = None,
) -> tuple[Score, ...]:
    """Scores images against a reference.

    Images are clamped and rounded to bytes first, so that they score as their PNGs would. Among
    several processes, every process passes its share of the batches and gets all scores.

    Args:
        network: The feature network.
        batches: Pairs of image numbers and images [B, C, H, W] in [-1, 1], as ``sample_batches``
            and ``image_batches`` yield them. They are read once.
        reference: The images to compare with: a tensor [m, C, H, W], data, the path of a folder or
            of statistics (.npz), or the result of ``prepare_reference``.
        sampler: A description of how the images were made, for the scores.
        metrics: The metrics beside the Fréchet distance; None computes no others.

    Returns:
        The Fréchet distance, then KID, precision and recall where ``metrics`` asks for them.

    Raises:
        DataError: There are too few images, features hold NaN or Inf, or the reference cannot be
            read or does not fit the network.
        ConfigError: The reference is a file of statistics and ``metrics`` needs its images.

    Example:
        >>> from sparsedm_compiler.diffusion import image_batches
        >>> pixels = FeatureNetwork("Pixels", lambda images: images.mean((2, 3)))
        >>> images = torch.linspace(-1, 1, 2880).reshape(60, 3, 4, 4)
        >>> batches = image_batches(images)
        >>> print(*score_images(pixels, batches, reference=images, sampler="identity"))
        FD-Pixels 0.000 (60 vs 60 images, identity)
    """
    metrics = metrics or Metrics()
    theirs = prepare_reference(network, reference, keep=metrics.keep)
    ours = summarize_features(network, batches, metrics.keep)
    count = ours.statistics.count
    assert count is not None, "moments count their images"
    value = gaussian_distance(ours.statistics, theirs.statistics)
    width = len(ours.statistics.mean)
    first = Score(value, network.name, count, theirs.statistics.count, sampler, width=width)
    note_few_images(first)
    return (first, *score_stored(first, ours.stored, theirs.stored, metrics))


def score_stored(like: Score, ours: Tensor, theirs: Tensor, metrics: Metrics) -> Iterator[Score]:
    """Yields the other ``metrics``, of stored features [n, d]; ``like`` gives the names."""
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


def prepare_reference(
    network: FeatureNetwork, reference: Reference, *, keep: int = 0, progress: bool = True
) -> FeatureSummary:
    """Reduces a reference to its features, once for any number of scores.

    Args:
        network: The feature network.
        reference: The images to compare with, as in ``score_images``.
        keep: The number of features to store for KID, precision and recall (``Metrics.keep``).
        progress: Show a progress bar on the first process.

    Returns:
        The features of the reference, to be passed to ``score_images``.

    Raises:
        DataError: The reference cannot be read, or holds statistics of another network.
        ConfigError: The reference is statistics, or was prepared with fewer features, and
            ``keep`` asks for more.
    """
    if isinstance(reference, FeatureSummary):
        if len(reference.stored) < min(keep, reference.statistics.count or keep):
            raise ConfigError(
                f"KID, precision and recall need {keep} features of the reference, which stored "
                f"{len(reference.stored)}: make it with prepare_reference(..., keep={keep})"
            )
        return reference
    if isinstance(reference, str | Path):
        if is_statistics(Path(reference)):
            return load_summary(network, Path(reference), keep)
        from ..data import open_data

        reference = open_data(str(reference), labels=False)
    share = own_share()
    total = sum(1 for _ in iterate_chunks(len(reference), CHUNK, share))
    name, shown = f"{network.name} features", progress and share[0] == 0
    with show_progress_bar(total, unit="batch", name=name, shown=shown) as bar:
        batches = count_batches(image_batches(reference, share=share), bar)
        return summarize_features(network, batches, keep)


def count_batches(batches: NumberedBatches, bar: ProgressBar) -> NumberedBatches:
    """Yields the batches, and counts each one when the next is asked for."""
    for batch in batches:
        yield batch
        bar.update()


def is_statistics(path: Path) -> bool:
    """Returns whether ``path`` is an .npz with a mean and a covariance, rather than with images."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except zipfile.BadZipFile:  # a damaged file, which its reader refuses
        return False


def load_summary(network: FeatureNetwork, path: Path, keep: int) -> FeatureSummary:
    """Reads the statistics in ``path`` as a reference.

    Raises ConfigError where features must be kept, DataError for statistics of another network.
    """
    if keep:
        raise ConfigError(
            f"{path} holds statistics and no features: KID, precision and recall need the images "
            "of the reference"
        )
    statistics = load_statistics(path)
    if statistics.network not in (None, network.name):
        raise DataError(
            f"{path} holds statistics of {statistics.network}, not of {network.name}: use that "
            "network, or make the statistics again"
        )
    return FeatureSummary(statistics, torch.zeros(0, len(statistics.mean), device="cpu"))


def summarize_features(
    network: FeatureNetwork, batches: Iterable[tuple[range, Tensor]], keep: int
) -> FeatureSummary:
    """Reduces the batches of all processes; stored features are in the order of the images.

    Raises DataError where no process has an image.
    """
    own = collect_features(network, batches, stored=keep)
    moments = merge_moments(own.moments)
    if moments is None:
        raise DataError(f"there are no images to take {network.name} features of")
    return FeatureSummary(moments.to_statistics(network.name), gather_stored(own))


def gather_stored(own: CollectedFeatures) -> Tensor:
    """Returns the stored features [n, d] of all processes, in the order of the image numbers."""
    parts = [part for part in gather_objects((own.numbers, own.stored)) if len(part[0])]
    if not parts:
        return own.stored
    order = torch.cat([numbers for numbers, _ in parts]).argsort()
    return torch.cat([rows for _, rows in parts])[order]


def note_few_images(score: Score) -> None:
    """Prints a note on the first process where there are too few images for the features."""
    if score.too_few is not None and own_share()[0] == 0:
        print(
            f"note: {score.too_few} images are too few for the {score.width} features of "
            f"{score.network}, which makes the Fréchet distance larger: compare it at equal counts "
            "only"
        )
