"""``OneShotReport``: how every weight was pruned, and by how much its layer's output moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One pruned weight.

    Attributes:
        weight: The parameter's name.
        pattern: What it was pruned to.
        shape: Its shape.
        method: The method whose result was kept: the one that was asked for, or "magnitude".
        reason: Why it is another than was asked for, as a sentence; "" where it is not.
        damping: The share of the Hessian's mean diagonal that was added to it; 0 for none.
        error: The squared error of the layer's output over its square, ``tr(D H D^T) / tr(W H
            W^T)`` with D the change of W; around the means where the bias took up their shift.
            None where the layer's inputs cannot be seen.
        magnitude_error: The same of magnitude pruning.
        kept_energy: The share of the sum of squares of the original weight that lies on the mask.
        parts: Parts that the columns were cut into, so that a Hessian fits the memory.
        bias: Whether the layer's bias took up the mean error.
    """

    weight: str
    pattern: str
    shape: tuple[int, ...]
    method: str
    reason: str
    damping: float
    error: float | None
    magnitude_error: float | None
    kept_energy: float
    parts: int
    bias: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LayerReport:
        """Returns the report that ``to_dict`` made."""
        return LayerReport(**{**values, "shape": tuple(values["shape"])})


@dataclass(frozen=True, slots=True)
class OneShotReport:
    """What ``prune_one_shot`` did.

    Attributes:
        method: The method that was asked for.
        rows: One row per pruned weight, in the order in which they were pruned.
        batches: The number of calibration batches.
        seconds: The time that it took.
    """

    method: str
    rows: tuple[LayerReport, ...]
    batches: int
    seconds: float

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The weights that were pruned by another method than was asked for."""
        return tuple(row.weight for row in self.rows if row.reason)

    @property
    def mean_error(self) -> float:
        """The mean of the layers' relative errors."""
        errors = [row.error for row in self.rows if row.error is not None]
        return sum(errors) / max(1, len(errors))

    @property
    def mean_magnitude_error(self) -> float:
        """The same mean if all had been pruned by magnitude."""
        errors = [row.magnitude_error for row in self.rows if row.magnitude_error is not None]
        return sum(errors) / max(1, len(errors))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "method": self.method,
            "batches": self.batches,
            "seconds": self.seconds,
            "mean_error": self.mean_error,
            "mean_magnitude_error": self.mean_magnitude_error,
            "layers": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        body = [
            (
                row.weight,
                row.pattern,
                "x".join(map(str, row.shape)),
                row.method,
                _format(row.error),
                _format(row.magnitude_error),
                f"{row.kept_energy:.3f}",
                f"{row.damping:g}" if row.damping else "",
                row.reason,
            )
            for row in self.rows
        ]
        head = ("weight", "pattern", "shape", "method", "error", "by magnitude", "kept energy")
        table = tabulate(body, (*head, "damping", "remark"), disable_numparse=True)
        return (
            f"{table}\n{len(self.rows)} weights pruned in one shot by {self.method}: mean error "
            f"{self.mean_error:.4f}, by magnitude {self.mean_magnitude_error:.4f}"
        )


def _format(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.4f}"
