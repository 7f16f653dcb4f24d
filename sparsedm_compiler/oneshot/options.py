"""``OneShotOptions``: the options of one-shot pruning that concern its method."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError

METHODS = ("obs", "wanda", "magnitude")
SOLVER_COPIES = 6
"""Matrices of the size of a Hessian, in float64, that solving for a layer needs."""
LEAST_MEMORY = 1 << 20


@dataclass(frozen=True, slots=True)
class OneShotOptions:
    """The options of ``prune_one_shot`` that concern its method; see there for each.

    Attributes:
        method: "obs", "wanda" or "magnitude".
        damping: Share of a Hessian's mean diagonal that is added to it; None chooses it by density.
        calibrate_bias: Whether a layer's bias takes up the mean of the error; None is for "obs"
            alone.
        passes: The most passes over the batches, more where the memory needs it.
        memory: Bytes that Hessians may take.

    Raises:
        ConfigError: A value is unknown or out of range.

    Example:
        >>> OneShotOptions(memory=4 << 30).most_columns
        9459
    """

    method: str = "obs"
    damping: float | None = None
    calibrate_bias: bool | None = None
    passes: int = 16
    memory: int = 4 << 30

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r} is none of {', '.join(METHODS)}")
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise ConfigError(f"damping {self.damping} is not a share >= 0, e.g. 0.01")
        if self.passes < 1:
            raise ConfigError(f"passes {self.passes} over the calibration batches is not >= 1")
        if self.memory < LEAST_MEMORY:
            raise ConfigError(f"memory {self.memory} bytes is not >= 1 MiB")

    @property
    def shifts_biases(self) -> bool:
        """Whether biases take up mean errors, once the default is resolved."""
        return self.method == "obs" if self.calibrate_bias is None else self.calibrate_bias

    @property
    def most_columns(self) -> int:
        """The columns of the widest Hessian that can be solved in the memory."""
        return math.isqrt(self.memory // (8 * SOLVER_COPIES))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)
