"""``Score``: a number together with everything it is not comparable without."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """The value of a metric: "FD" (Fréchet distance), "KID", "precision" or "recall".

    ``network``: the feature network, as in "FD-DigitsCNN"; only InceptionV3 makes it a FID.
    ``count``/``reference_count``: images on either side, None where a file of statistics does not
    say. ``sampler``: how the images were made. ``spread``: one standard deviation, where there is
    one.
    """

    value: float
    network: str
    count: int
    reference_count: int | None
    sampler: str
    metric: str = "FD"
    spread: float | None = None

    def __str__(self) -> str:
        value = f"{self.value:.3f}" if self.metric == "FD" else f"{self.value:.4g}"
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        count = "unknown" if self.reference_count is None else self.reference_count
        return (
            f"{self.metric}-{self.network} {value}{spread} "
            f"({self.count} vs {count} images, {self.sampler})"
        )
