"""Train and eval mode for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Runs a block with a model in train or eval mode and restores every submodule's mode.

    Args:
        model: The model whose mode is set.
        training: True for train mode, False for eval mode.

    Yields:
        Nothing.

    Example:
        >>> model = nn.Sequential(nn.Dropout())
        >>> with in_mode(model, training=False):
        ...     model[0].training
        False
        >>> model[0].training
        True
    """
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs a block in eval mode and without gradients, and restores every submodule's mode.

    Args:
        model: The model whose mode is set.

    Yields:
        Nothing.

    Example:
        >>> with evaluating(nn.Dropout()) as _:
        ...     torch.is_grad_enabled()
        False
    """
    with in_mode(model, training=False), torch.no_grad():
        yield
