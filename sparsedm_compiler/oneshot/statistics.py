"""The second moments of a layer's inputs, which the Hessian of its output error is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..patterns import Pattern
from .layer_matrix import iterate_rows


@dataclass(slots=True)
class LayerStatistics:
    """Weighted sums over the inputs x of one weight: of (x - c) (x - c)^T, of x - c, and of 1.

    c is the mean of the first inputs, so that nothing is lost where they are far from zero. A
    matrix too wide for the memory is cut into ``parts``: of products only the blocks of the columns
    of one part are kept.

    Attributes:
        name: The weight's name.
        parts: Ranges of columns.
        squares: The sum of (x - c) (x - c)^T of every part, float32.
        total: The sum of x - c, float32.
        center: c, float32; None before the first inputs.
        count: The sum of the weights of all x.
    """

    name: str
    parts: tuple[range, ...]
    device: torch.device
    squares: list[Tensor] = field(default_factory=list)
    total: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    count: float = 0.0
    center: Tensor | None = None

    def __post_init__(self) -> None:
        empty = torch.zeros
        self.squares = [empty(len(p), len(p), device=self.device) for p in self.parts]
        self.total = empty(self.parts[-1].stop, device=self.device)

    def add(self, values: Mapping[str, Any], op: str, weight: float) -> None:
        """Adds the inputs of one product, each ``weight`` times.

        Raises:
            DataError: The inputs hold NaN or Inf, or cannot be seen.
        """
        for x in iterate_rows(values, op, len(self.total)):
            x = x.to(self.device)
            if self.center is None:
                self.center = x.mean(0)
            x = x - self.center
            for part, sums in zip(self.parts, self.squares, strict=True):
                columns = x[:, part.start : part.stop]
                sums.addmm_(columns.T, columns, alpha=weight)
            self.total.add_(x.sum(0), alpha=weight)
            self.count += weight * len(x)
        if not bool(self.total.isfinite().all()):
            raise DataError(
                f"the inputs of {self.name!r} hold NaN or Inf in the calibration run: check data "
                "and weights, or run the model in float32 (float16 overflows)"
            )

    def compute_hessians(self, *, centered: bool) -> list[Tensor]:
        """Returns E[x x^T] of every part in float64, of x - E[x] if ``centered``."""
        rest, mean = self.total.to(torch.float64) / self.count, self.compute_mean()
        hessians = []
        for part, sums in zip(self.parts, self.squares, strict=True):
            own = rest[part.start : part.stop]
            hessian = sums.to(torch.float64) / self.count - torch.outer(own, own)
            hessian.diagonal().clamp_(min=0)
            if not centered:
                whole = mean[part.start : part.stop]
                hessian += torch.outer(whole, whole)
            hessians.append(hessian)
        return hessians

    def compute_mean(self) -> Tensor:
        """Returns E[x] in float64."""
        assert self.center is not None
        return self.total.to(torch.float64) / self.count + self.center


def cut_columns(columns: int, pattern: Pattern, most: int) -> tuple[range, ...]:
    """Cuts the columns of a matrix into parts of at most ``most``, of whole groups each.

    A group of a pattern is never cut, so that a part may be wider where a group is.
    """
    if columns <= most:
        return (range(columns),)
    step = max(1, most // pattern.width) * pattern.width
    return tuple(range(a, min(a + step, columns)) for a in range(0, columns, step))
