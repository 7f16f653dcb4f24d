"""``static_mask``: the mask of the weights of now, for ever (ASP, Mishra et al. 2021)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import masked_parameters
from .fsdp import here, mask_here


@torch.no_grad()
def static_mask(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Zero the pruned weights of ``model`` and keep them zero; ``remove()`` on the result ends it.

    Their gradients are zeroed before every step, and AdamW and SGD move no weight that is zero and
    whose gradients all were. A mask taken afresh of such weights is the same mask: zeros are never
    among the largest, but for a kept weight that is zero itself.

    Call the model once before. Raises ConfigError if it was not compiled.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    for weight, pattern in masked_parameters(model).values():
        kept.append((weight, mask_here(weight, pattern)))
        here(weight).mul_(kept[-1][1])
    return optimizer.register_step_pre_hook(partial(_keep_zero, kept=kept))


@torch.no_grad()
def _keep_zero(
    optimizer: Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    kept: list[tuple[nn.Parameter, Tensor]],
) -> None:
    for weight, mask in kept:
        if weight.grad is not None:
            here(weight.grad).mul_(mask)
