"""Classifier-free guidance (Ho & Salimans 2022): pred = null + scale (cond - null)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from .condition import (
    Condition,
    describe_condition,
    map_condition,
    move_condition,
    stack_conditions,
)
from .predict import predict


@dataclass(frozen=True, slots=True)
class Guidance:
    """How far to go from "no condition" to the condition: 1 is the condition itself.

    ``null``: what the model is told for no condition: a class label, or the tensors of one image
    without their batch, under the names of the condition. Raises ConfigError where ``scale`` is
    no finite number.
    """

    scale: float
    null: int | Condition

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ConfigError(f"guidance scale {self.scale} is not a finite number")

    def nulls(self, like: Condition, count: int) -> Condition:
        """``null`` for ``count`` images, in the form of the condition ``like``."""
        if not isinstance(self.null, int):
            return map_condition(lambda part: part.expand(count, *part.shape), self.null)
        if not isinstance(like, Tensor):
            raise DataError(
                f"the null label {self.null} fits no condition {describe_condition(like)}: give "
                "Guidance(null=...) the tensors of one image under the same names"
            )
        return torch.full_like(like, self.null)


def apply_guidance(
    model: nn.Module, x: Tensor, t: Tensor, y: Condition | None, guidance: Guidance | None
) -> Tensor:
    """What ``model`` predicts, float32, with ``guidance`` in one batch of twice the images."""
    if guidance is None:
        return predict(model, x, t, y).float()
    if y is None:
        raise DataError(
            f"guidance {guidance.scale} without a condition: give labels or a condition"
        )
    nulls = move_condition(guidance.nulls(y, len(x)), x)
    both = predict(model, torch.cat([x, x]), torch.cat([t, t]), stack_conditions(y, nulls)).float()
    cond, null = both.chunk(2)
    return null + guidance.scale * (cond - null)
