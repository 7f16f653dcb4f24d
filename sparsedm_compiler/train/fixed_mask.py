"""``static_mask``: one mask, computed once and never changed (ASP, Mishra et al. 2021)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import masked_parameters
from .fsdp import compute_local_mask, get_local_rows


@torch.no_grad()
def static_mask(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Zeroes the pruned weights of ``model`` and keeps them zero.

    Their gradients are zeroed before every step, and AdamW and SGD move no weight that is zero and
    whose gradients all were. A mask computed afresh of such weights is the same mask: zeros are
    never among the largest, but for a kept weight that is zero itself.

    Args:
        optimizer: The optimizer that steps the model's parameters.
        model: A compiled model that has been called at least once.

    Returns:
        A handle whose ``remove()`` lets the pruned weights move again.

    Raises:
        ConfigError: ``model`` was not compiled.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> _ = student(torch.randn(1, 8))
        >>> optimizer = torch.optim.AdamW(student.parameters())
        >>> handle = static_mask(optimizer, student)
        >>> int((student[1].weight == 0).sum())
        32
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    for weight, pattern in masked_parameters(model).values():
        kept.append((weight, compute_local_mask(weight, pattern)))
        get_local_rows(weight).mul_(kept[-1][1])
    return optimizer.register_step_pre_hook(partial(_zero_pruned_gradients, kept=kept))


@torch.no_grad()
def _zero_pruned_gradients(
    optimizer: Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    kept: list[tuple[nn.Parameter, Tensor]],
) -> None:
    for weight, mask in kept:
        if weight.grad is not None:
            get_local_rows(weight.grad).mul_(mask)
