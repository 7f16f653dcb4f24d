"""``make_calibration_batches``: noised images for one-shot pruning, as training has them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import CalibrationBatch, ConfigError, DataError
from ..optional_deps import require_extra

if TYPE_CHECKING:
    from ..diffusion.condition import Condition
    from ..diffusion.objective import NoiseScheduler, Objective
    from .batches import Data

TIMESTEP_WEIGHTS = ("uniform", "logarithmic")
FIRST, LAST = 1.2, 0.8
"""The weights of the first and the last step of sampling, of OBS-Diff (Zhu et al. 2025)."""


def make_calibration_batches(
    model: nn.Module,
    data: Data,
    *,
    images: int = 512,
    batch_size: int = 32,
    objective: str | Objective = "eps",
    scheduler: NoiseScheduler | None = None,
    levels: str = "uniform",
    timestep_weights: str = "uniform",
    seed: int = 0,
) -> list[CalibrationBatch]:
    """Makes calls of a model on noised images, for ``prune_one_shot``.

    The first ``images`` of the data get noise levels that are spread evenly over the objective's
    own distribution. Every batch holds neighbouring levels, so that a level can have a weight; the
    noisiest come first. All depends on ``seed`` and the data alone.

    Args:
        model: The diffusion model; its device and dtype are those of the batches.
        data: Images float [n, C, H, W] in [-1, 1], (images, labels [n]), a map-style Dataset of
            either, or an iterable of batches of either.
        images: The most images to use; data with fewer are used once.
        batch_size: Images per call.
        objective: What the model predicts: "eps", "v", "x0" or "flow".
        scheduler: A variance-preserving scheduler of diffusers. None is DDPM with linear betas;
            flow matching takes none.
        levels: Distribution of noise levels: "uniform" or, for flow matching alone,
            "logit-normal".
        timestep_weights: "uniform" counts all levels alike. "logarithmic" falls from 1.2 at the
            noisiest level, with which sampling begins, to 0.8 at the last, as OBS-Diff (Zhu et al.
            2025) does: ``1.2 - 0.4 log(1 + k) / log(1 + K)`` for batch k of 0 to K.
        seed: Of levels and noise.

    Returns:
        The calls of one pass.

    Raises:
        DataError: There are no images, or they are of the wrong kind.
        ConfigError: An option has an unknown value, or scheduler and objective do not go together.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> from sparsedm_compiler.models import UViT
        >>> model = UViT(img_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2)
        >>> batches = sdm.make_calibration_batches(model, torch.zeros(40, 1, 4, 4))
        >>> [len(batch.args[0]) for batch in batches]
        [32, 8]
    """
    with require_extra("make_calibration_batches", "train"):
        from ..diffusion import generator_at
        from ..diffusion.condition import take_rows
        from ..diffusion.objective import make_objective
        from .validation import spread_levels
    check_options(images, batch_size, timestep_weights)
    if isinstance(objective, str):
        objective = make_objective(objective, scheduler, levels)
    x0, condition = _take_images(data, images, batch_size)
    source = generator_at(seed, "calibration")
    u = spread_levels(len(x0), source).sort(descending=True).values
    noise = torch.randn(x0.shape, generator=source, device="cpu")
    x, t, _ = objective.prepare(x0, noise, u)
    rows = [range(a, min(a + batch_size, len(x0))) for a in range(0, len(x0), batch_size)]
    batches = []
    for k, part in enumerate(rows):
        own = slice(part.start, part.stop)
        y = None if condition is None else take_rows(condition, part)
        weight = 1.0 if timestep_weights == "uniform" else weigh_batch(k, len(rows))
        batches.append(_make_batch(model, x[own], t[own], y, weight))
    return batches


def check_options(images: int, batch_size: int, timestep_weights: str) -> None:
    """Raises ConfigError for options of ``make_calibration_batches`` that fit nothing."""
    if timestep_weights not in TIMESTEP_WEIGHTS:
        names = " nor ".join(map(repr, TIMESTEP_WEIGHTS))
        raise ConfigError(f"timestep_weights {timestep_weights!r} is neither {names}")
    if images < 1 or batch_size < 1:
        raise ConfigError(f"{images} images in batches of {batch_size} are not >= 1")


def weigh_batch(number: int, count: int) -> float:
    """Returns the weight of batch ``number`` of ``count``, which falls as OBS-Diff's do.

    >>> weigh_batch(0, 9), round(weigh_batch(2, 9), 2), round(weigh_batch(8, 9), 2)
    (1.2, 1.0, 0.8)
    """
    if count == 1:
        return 1.0
    return FIRST - (FIRST - LAST) * math.log(1 + number) / math.log(count)


def _make_batch(
    model: nn.Module, x: Tensor, t: Tensor, y: Condition | None, weight: float
) -> CalibrationBatch:
    from ..diffusion.condition import move_condition
    from ..diffusion.predict import build_arguments

    like = next(model.parameters())
    moved = None if y is None else move_condition(y, like)
    inputs = build_arguments(model, x.to(like.device, like.dtype), t.to(like.device), moved)
    return CalibrationBatch(*inputs, weight)


def _take_images(data: Data, count: int, size: int) -> tuple[Tensor, Condition | None]:
    """Returns the first images, float32 on the CPU, and their condition."""
    from ..diffusion.condition import stack_conditions, take_rows
    from .batches import iterate_once
    from .check_call import check_values

    images: list[Tensor] = []
    condition: Condition | None = None
    left = count
    for batch, y in iterate_once(data, size):
        taken = range(min(left, len(batch)))
        images.append(batch[: len(taken)].cpu().float())
        part = None if y is None else take_rows(y, taken)
        condition = part if condition is None or part is None else stack_conditions(condition, part)
        left -= len(taken)
        if left == 0:
            break
    if not images:
        raise DataError("there are no images to calibrate with")
    check_values(torch.cat(images))
    return torch.cat(images), condition
