"""Gradient checkpointing of a student: its blocks are computed again in the backward pass.

A model that can do it by itself does (diffusers, U-ViT). In any other, the modules that stand in a
list of their like (``nn.ModuleList``, ``nn.Sequential``) are its blocks. Masks are computed outside
of blocks, so that none is computed twice.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import ConfigError
from .find_blocks import find_blocks


@runtime_checkable
class CheckpointingModel(Protocol):
    """A model that has gradient checkpointing of its own, as models of diffusers do."""

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None
    ) -> None:
        """Begins it; the function is called with a block and its inputs."""

    def disable_gradient_checkpointing(self) -> None:
        """Ends it."""


@contextmanager
def checkpointing_gradients(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Checkpoints the blocks of ``model`` for the block of code, if that is ``wanted``.

    A model that did so before goes on doing it afterwards. Raises ConfigError where the model has
    no blocks.
    """
    if not wanted or is_checkpointing(model):
        yield
        return
    start_checkpointing(model)
    try:
        yield
    finally:
        stop_checkpointing(model)


def is_checkpointing(model: nn.Module) -> bool:
    """Returns whether a model checkpoints its blocks, by itself or by ``start_checkpointing``."""
    flags = ("gradient_checkpointing", "use_checkpoint")
    own = any(vars(m).get(flag) is True for m in model.modules() for flag in flags)
    return own or any(map(is_wrapped, model.modules()))


def start_checkpointing(model: nn.Module) -> None:
    """Begins to checkpoint the blocks of ``model``. Raises ConfigError where it has none."""
    if isinstance(model, CheckpointingModel):
        try:
            model.enable_gradient_checkpointing()
        except ValueError:  # diffusers: this class has none
            pass
        else:
            return
    blocks = find_blocks(model)
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing of its own, and no list of "
            "blocks that could be checkpointed one by one: leave gradient_checkpointing off"
        )
    for block in blocks:
        block.__dict__["forward"] = types.MethodType(run_checkpointed, block)


def stop_checkpointing(model: nn.Module) -> None:
    """Ends what ``start_checkpointing`` began, in the model itself or in a copy of it."""
    for block in model.modules():
        if is_wrapped(block):
            del block.__dict__["forward"]
    if isinstance(model, CheckpointingModel):
        model.disable_gradient_checkpointing()


def copy_checkpointing(model: nn.Module, copied: nn.Module | None) -> None:
    """Ends checkpointing in a copy of ``model``, if there is one, unless ``model`` does it."""
    if copied is not None and is_checkpointing(copied) and not is_checkpointing(model):
        stop_checkpointing(copied)


def is_wrapped(block: nn.Module) -> bool:
    """Returns whether ``start_checkpointing`` has replaced the forward of a module."""
    forward: Any = vars(block).get("forward")
    return isinstance(forward, types.MethodType) and forward.__func__ is run_checkpointed


def run_checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs the own forward of a block, which keeps its inputs alone for the backward pass."""
    own: Callable[..., Any] = type(block).forward
    if not torch.is_grad_enabled():
        return own(block, *args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return own(block, *args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)
