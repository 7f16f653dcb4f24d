"""How a diffusion model of any make is called: one prediction, one mode, one seed per position."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError


def predict(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """What ``model(x, t)`` or ``model(x, t, y)`` predicts, shaped like ``x`` [B, C, ...].

    The model may return a tensor, a tuple that starts with one, or an object with ``.sample`` (the
    outputs of diffusers). Raises DataError where the prediction is not shaped like ``x``.
    """
    out: Any = model(x, t) if y is None else model(x, t, y)
    if isinstance(out, tuple):
        out = out[0]
    found: Tensor = out if isinstance(out, Tensor) else out.sample
    if found.shape != x.shape:
        raise DataError(
            f"{type(model).__name__} predicted {list(found.shape)} for inputs {list(x.shape)}: "
            "the noise prediction must be shaped like its input"
        )
    return found


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run the block with ``model`` in train or eval mode; every submodule's mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and without gradients; every submodule's mode comes back."""
    with in_mode(model, training=False), torch.no_grad():
        yield


def seed_at(*position: int | str) -> int:
    """A 63-bit seed that depends on the whole position, e.g. (seed, "noise", images seen).

    >>> seed_at(0, "noise", 64) == seed_at(0, "noise", 64) != seed_at(0, "noise", 128)
    True
    """
    return random.Random("/".join(map(str, position))).getrandbits(63)


def generator_at(*position: int | str) -> torch.Generator:
    """A CPU generator seeded by ``seed_at``: the same numbers whatever the device and the batch."""
    return torch.Generator().manual_seed(seed_at(*position))
