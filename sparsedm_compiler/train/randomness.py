"""Every random value for image k of a run, drawn from (seed, k) alone.

So neither the batch size, nor the number of processes, nor an interruption changes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import generator_at
from ..diffusion.condition import Condition, map_condition, move, stack_conditions
from ..errors import ConfigError
from .finetune_config import FinetuneConfig


@dataclass(frozen=True, slots=True)
class RandomValues:
    """For B images: noise of their shape, a level u in [0, 1) (float64), flip and drop or not."""

    noise: Tensor
    u: Tensor
    flip: Tensor
    drop: Tensor


def draw_values(config: FinetuneConfig, first: int, shape: torch.Size) -> RandomValues:
    """Draws the values of images ``first`` to ``first + shape[0] - 1``, on the CPU.

    ``shape``: [B, C, H, W], of all these images together.
    """
    noise = torch.empty(shape, device="cpu")
    three = torch.empty(shape[0], 3, dtype=torch.float64, device="cpu")
    for row in range(shape[0]):
        source = generator_at(config.seed, "image", first + row)
        torch.rand(3, generator=source, dtype=torch.float64, out=three[row], device="cpu")
        torch.randn(shape[1:], generator=source, out=noise[row], device="cpu")
    u, flip, drop = three.unbind(1)
    return RandomValues(noise, u, flip < 0.5, drop < config.drop_condition)


def flip_images(images: Tensor, flip: Tensor) -> Tensor:
    """Mirrors those of ``images`` [B, ..., W] for which ``flip`` [B] is True."""
    where = move(flip, images.device).reshape(-1, *[1] * (images.dim() - 1))
    return torch.where(where, images.flip(-1), images)


def drop_conditions(
    condition: Condition | None,
    drop: Tensor,
    null_label: int | None,
    null: Condition | None,
) -> Condition | None:
    """Replaces the condition of the images for which ``drop`` [B] is True by "none".

    That is ``null_label`` for class labels; for text ``null`` (one row of it), else zeros.
    Raises ConfigError where class labels are to be dropped and there is no ``null_label``.
    """
    if condition is None or not drop.any():
        return condition
    if isinstance(condition, Tensor):
        if null_label is None:
            raise ConfigError(
                "drop_condition needs null_label, the class that stands for no class: "
                "usually the number of classes, in a model built with one class more"
            )
        return torch.where(move(drop, condition.device), null_label, condition)
    if null is None:
        null = map_condition(lambda part: torch.zeros_like(part[:1]), condition)
    count = len(drop)
    both = stack_conditions(condition, null)
    rows = torch.where(drop, count, torch.arange(count, device="cpu"))
    return map_condition(lambda part: part[move(rows, part.device)], both)
