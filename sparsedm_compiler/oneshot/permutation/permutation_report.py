"""``PermutationReport``: which channels were permuted, and the energy that patterns keep for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True, slots=True)
class PermutedChannels:
    """Channels that were permuted together.

    Attributes:
        writers: The weights whose rows they are.
        readers: The weights whose columns they are.
        channels: How many may change places with each other.
        sets: How many such sets there are, one for every head or group of a norm.
        moved: How many channels have another place now.
        kept_before: The mean share of the energy that the pattern kept of the pruned weights among
            them.
        kept_after: The same afterwards.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: int
    sets: int
    moved: int
    kept_before: float
    kept_after: float


@dataclass(frozen=True, slots=True)
class WeightEnergy:
    """A weight that is to be pruned.

    Attributes:
        weight: Its name.
        pattern: What it is to be pruned to.
        kept_before: The share of its energy that the pattern kept.
        kept_after: The same afterwards.
        refusal: Why its input channels were not permuted, as a sentence; "" where they were.
    """

    weight: str
    pattern: str
    kept_before: float
    kept_after: float
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class PermutationReport:
    """What ``permute_channels`` did.

    Attributes:
        score: "magnitude" or "wanda": what energy is the sum of squares of.
        rows: The channels that were permuted, one row per set of weights.
        weights: One row per weight to prune, in the order of use.
        difference: The largest change of an output of the model, over its largest magnitude.
        seconds: The time that it took.
    """

    score: str
    rows: tuple[PermutedChannels, ...]
    weights: tuple[WeightEnergy, ...]
    difference: float
    seconds: float

    @property
    def kept_before(self) -> float:
        """The mean share of energy that was kept of the weights."""
        return sum(row.kept_before for row in self.weights) / max(1, len(self.weights))

    @property
    def kept_after(self) -> float:
        """The mean share of energy that is kept of the weights now."""
        return sum(row.kept_after for row in self.weights) / max(1, len(self.weights))

    @property
    def refusals(self) -> dict[str, str]:
        """Why the input channels of some weights were not permuted, by weight."""
        return {row.weight: row.refusal for row in self.weights if row.refusal}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "score": self.score,
            "kept_before": self.kept_before,
            "kept_after": self.kept_after,
            "difference": self.difference,
            "seconds": self.seconds,
            "channels": [asdict(row) for row in self.rows],
            "weights": [asdict(row) for row in self.weights],
        }

    def __str__(self) -> str:
        body = [
            (
                row.weight,
                row.pattern,
                f"{row.kept_before:.4f}",
                f"{row.kept_after:.4f}",
                row.refusal,
            )
            for row in self.weights
        ]
        head = ("weight", "pattern", "kept before", "kept after", "not permuted because")
        table = tabulate(body, head, disable_numparse=True)
        moved = sum(row.moved for row in self.rows)
        return (
            f"{table}\n{moved} channels moved in {len(self.rows)} places of the graph: mean kept "
            f"energy {self.kept_before:.4f} before, {self.kept_after:.4f} after; outputs differ by "
            f"{self.difference:.1e}"
        )
