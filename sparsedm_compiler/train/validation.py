"""``held_out_loss``: the denoising loss on fixed noise, comparable between models and runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..meta_models import require_values
from ..optional_deps import require_extra

if TYPE_CHECKING:
    from ..diffusion.objective import NoiseScheduler, Objective
    from .batches import Data


def held_out_loss(
    model: nn.Module,
    data: Data,
    *,
    scheduler: NoiseScheduler | None = None,
    objective: str | Objective = "eps",
    draws: int = 4,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """Computes the mean squared error of a model's prediction over held-out data.

    Noise and noise levels depend on ``seed``, the repetition and the position in the data alone,
    and the levels of a batch are spread evenly, so the same call compares two models on the same
    inputs. The model keeps its mode.

    Args:
        model: The model to measure, sparse or dense.
        data: Images float [n, C, H, W] in [-1, 1], (images, labels [n]), a map-style Dataset of
            either, or an iterable of batches of either.
        scheduler: A variance-preserving scheduler of diffusers. None is DDPM with linear betas;
            flow matching takes none.
        objective: What the model predicts: "eps", "v", "x0" or "flow".
        draws: How many times the data are gone through, with other noise each time.
        batch_size: Images per forward; unused where the data come in batches of their own.
        seed: Of noise and levels.

    Returns:
        The mean over all values of all predictions.

    Raises:
        DataError: There are no data, or they are of the wrong kind.
        ConfigError: Scheduler and objective do not go together, or a package of the extra "train"
            is not installed.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> from sparsedm_compiler.models import UViT
        >>> model = UViT(img_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2)
        >>> sdm.held_out_loss(model, torch.zeros(4, 1, 4, 4)) > 0
        True
    """
    with require_extra("held_out_loss", "train"):
        from ..diffusion import evaluating, generator_at, predict
        from ..diffusion.condition import move_condition
        from ..diffusion.objective import make_objective
        from .batches import iterate_once
    if isinstance(objective, str):
        objective = make_objective(objective, scheduler)
    require_values(model, "its loss")
    parameter = next(model.parameters())
    total, values = 0.0, 0
    with evaluating(model):
        for draw in range(draws):
            seen = 0
            for images, condition in iterate_once(data, batch_size):
                source = generator_at(seed, "held out", draw, seen)
                x0 = images.to(parameter.device, torch.float32)
                noise = torch.randn(x0.shape, generator=source, device="cpu").to(parameter.device)
                u = spread_levels(len(x0), source).to(parameter.device)
                x, t, target = objective.prepare(x0, noise, u)
                y = None if condition is None else move_condition(condition, parameter)
                guess = predict(model, x.to(parameter.dtype), t, y)
                total += (guess.double() - target.double()).square().sum().item()
                values += noise.numel()
                seen += len(x0)
    if values == 0:
        raise DataError("there are no held-out images")
    return total / values


def spread_levels(size: int, source: torch.Generator) -> Tensor:
    """Draws ``size`` numbers in [0, 1), one from each of ``size`` equal spans, in random order."""
    within = torch.rand(size, generator=source, dtype=torch.float64, device="cpu")
    spans = torch.randperm(size, generator=source, device="cpu").double()
    return (spans + within) / size
