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
    """Classifier-free guidance: its scale, and the condition that stands for "no condition".

    The prediction is ``null + scale * (cond - null)`` (Ho & Salimans 2022), computed in one batch
    of twice the images.

    Attributes:
        scale: Guidance scale; 0 is unconditional, 1 is the condition itself.
        null: The class label of "no class" (1000 on ImageNet), or the tensors of one image without
            a batch dimension, under the same names as the condition.

    Raises:
        ConfigError: ``scale`` is not a finite number.

    Example:
        >>> Guidance(2.0, null=10).expand_null(torch.tensor([3, 1]), 2)
        tensor([10, 10])
    """

    scale: float
    null: int | Condition

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ConfigError(f"guidance scale {self.scale} is not a finite number")

    def move_null(self, like: Tensor) -> Guidance:
        """Returns the guidance with its null on the device of ``like``, and in its dtype."""
        if isinstance(self.null, int):
            return self
        return Guidance(self.scale, move_condition(self.null, like))

    def expand_null(self, like: Condition, count: int) -> Condition:
        """Repeats ``null`` for ``count`` images, in the form of the condition ``like``.

        Raises DataError for a null label where ``like`` is a mapping.
        """
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
    """Returns the float32 prediction of ``model``, guided where ``guidance`` is not None.

    Guidance runs the model once, on a batch of twice the images. Raises DataError for guidance
    without a condition, or where the null does not fit the condition.
    """
    if guidance is None:
        return predict(model, x, t, y).float()
    if y is None:
        raise DataError(
            f"guidance {guidance.scale} without a condition: give labels or a condition"
        )
    null_condition = move_condition(guidance.expand_null(y, len(x)), x)
    stacked = stack_conditions(y, null_condition)
    both = predict(model, torch.cat([x, x]), torch.cat([t, t]), stacked).float()
    cond, null = both.chunk(2)
    return null + guidance.scale * (cond - null)
