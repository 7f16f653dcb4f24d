"""One score, together with everything that it is not comparable without."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST = 20
"""Images below which no score means anything, however few features there are."""


@dataclass(frozen=True, slots=True)
class ScoreKey:
    """Everything that two scores must share to be comparable."""

    metric: str
    network: str
    count: int
    reference_count: int | None
    sampler: str


@dataclass(frozen=True, slots=True)
class Score:
    """The value of a metric, together with everything that it is not comparable without.

    Attributes:
        value: The value.
        network: The feature network, as in "FD-DigitsCNN"; only "FD-InceptionV3" is a FID.
        count: The number of images scored.
        reference_count: The number of reference images, None where a file of statistics does not
            say.
        sampler: A description of how the images were made.
        metric: "FD" (Fréchet distance), "KID", "precision" or "recall".
        spread: One standard deviation of the value, None where the metric has none.
        width: The number of features, None where it is not known.

    Example:
        >>> print(Score(12.3456, "DigitsCNN", 360, 1437, "DDIMScheduler 50 steps"))
        FD-DigitsCNN 12.346 (360 vs 1437 images, DDIMScheduler 50 steps)
        >>> print(Score(0.5, "DigitsCNN", 16, 1437, "DDIMScheduler 50 steps", width=64).warning)
        : 16 images are too few, take at least 64
    """

    value: float
    network: str
    count: int
    reference_count: int | None
    sampler: str
    metric: str = "FD"
    spread: float | None = None
    width: int | None = None

    @property
    def too_few(self) -> int | None:
        """The number of images or reference images, where it is too small for the features."""
        counts = [self.count, *(() if self.reference_count is None else (self.reference_count,))]
        return min(counts) if min(counts) < max(FEWEST, self.width or 0) else None

    @property
    def key(self) -> ScoreKey:
        """Everything that two scores must share to be comparable."""
        return ScoreKey(self.metric, self.network, self.count, self.reference_count, self.sampler)

    def __str__(self) -> str:
        value = f"{self.value:.3f}" if self.metric == "FD" else f"{self.value:.4g}"
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        count = "unknown" if self.reference_count is None else self.reference_count
        return (
            f"{self.metric}-{self.network} {value}{spread} "
            f"({self.count} vs {count} images, {self.sampler}){self.warning}"
        )

    @property
    def warning(self) -> str:
        """What to say after the value where there are too few images, else empty."""
        if self.too_few is None:
            return ""
        wanted = max(FEWEST, self.width or 0)
        return f": {self.too_few} images are too few, take at least {wanted:,}"
