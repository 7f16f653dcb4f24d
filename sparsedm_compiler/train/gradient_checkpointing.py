"""Gradient checkpointing of a student: its blocks are computed again in the backward pass.

A model that can do it by itself does (diffusers, U-ViT). In any other, the modules that stand in a
list of their like (``nn.ModuleList``, ``nn.Sequential``) are its blocks. Masks are computed outside
of blocks, so that none is computed twice.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

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


Forward: TypeAlias = Callable[..., Any]
"""The forward of a class, which is called with a module and its inputs."""

RUNS_BLOCK = "sparsedm_runs_block"
"""The attribute of the forwards that ``start_checkpointing`` makes: their code, as what wraps one
of them by ``functools.wraps`` has its attributes but not its code."""

RunBlock: TypeAlias = Callable[..., Any]
"""A function that is called with the forward of a block and its inputs, as torch's checkpoint."""


@contextmanager
def checkpointing_gradients(
    model: nn.Module, wanted: bool, *, by_block: bool = False
) -> Iterator[None]:
    """Checkpoints the blocks of ``model`` for the block of code, if that is ``wanted``.

    A model that did so before goes on doing it afterwards. ``by_block``: see
    ``start_checkpointing``. Raises ConfigError where the model has no blocks.
    """
    if not wanted or is_checkpointing(model):
        yield
        return
    start_checkpointing(model, by_block=by_block)
    try:
        yield
    finally:
        stop_checkpointing(model)


@contextmanager
def running_blocks_by(
    model: nn.Module, run: RunBlock | None, *, by_block: bool = False
) -> Iterator[None]:
    """Lets ``run`` run what checkpointing would run again; None changes nothing.

    Raises ConfigError where the model has no blocks.
    """
    if run is None:
        yield
        return
    before, wrapped = is_checkpointing(model), any(map(is_wrapped, model.modules()))
    if before:
        stop_checkpointing(model)
    try:
        start_checkpointing(model, run, by_block=by_block or wrapped)
        yield
    finally:
        stop_checkpointing(model)
        if before:
            start_checkpointing(model, by_block=wrapped)


def is_checkpointing(model: nn.Module) -> bool:
    """Returns whether a model checkpoints its blocks, by itself or by ``start_checkpointing``."""
    return checkpoints_by_itself(model) or any(map(is_wrapped, model.modules()))


def checkpoints_by_itself(model: nn.Module) -> bool:
    """Returns whether a model checkpoints its blocks by means of its own."""
    flags = ("gradient_checkpointing", "use_checkpoint")
    return any(vars(m).get(flag) is True for m in model.modules() for flag in flags)


def start_checkpointing(
    model: nn.Module, run: RunBlock | None = None, *, by_block: bool = False
) -> None:
    """Begins to checkpoint the blocks of ``model``. Raises ConfigError where it has none.

    ``run``: runs a block; None is torch's checkpoint. ``by_block``: inside of blocks, where there
    are any, rather than by the model's own means, which call a block with its hooks once more.
    """
    blocks = find_blocks(model)
    if isinstance(model, CheckpointingModel) and not (by_block and blocks):
        try:
            model.enable_gradient_checkpointing(*(() if run is None else (run,)))
        except ValueError:  # diffusers: this class has none
            pass
        else:
            return
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing of its own, and no list of "
            "blocks that could be checkpointed one by one: leave gradient_checkpointing off"
        )
    for block in blocks:
        # TorchDynamo reads no method of a class that diffusers allows in graphs, and that of torch
        # 2.14 asks the function of a method for its name: no partial will do.
        own: Forward = type(block).forward
        forward = checkpoint_forward(own) if run is None else hand_over_forward(own, run)
        vars(forward)[RUNS_BLOCK] = forward.__code__
        block.__dict__["forward"] = types.MethodType(forward, block)


def stop_checkpointing(model: nn.Module) -> None:
    """Ends what ``start_checkpointing`` began, in the model itself or in a copy of it."""
    for block in model.modules():
        if is_wrapped(block):
            del block.__dict__["forward"]
    if isinstance(model, CheckpointingModel) and checkpoints_by_itself(model):
        model.disable_gradient_checkpointing()


def copy_checkpointing(model: nn.Module, copied: nn.Module | None) -> None:
    """Ends checkpointing in a copy of ``model``, if there is one, unless ``model`` does it."""
    if copied is not None and is_checkpointing(copied) and not is_checkpointing(model):
        stop_checkpointing(copied)


def is_wrapped(block: nn.Module) -> bool:
    """Returns whether ``start_checkpointing`` has replaced the forward of a module."""
    forward: Any = vars(block).get("forward")
    if not isinstance(forward, types.MethodType):
        return False
    function: Any = forward.__func__
    code = getattr(function, "__code__", None)
    return code is not None and getattr(function, RUNS_BLOCK, None) is code


def checkpoint_forward(own: Forward) -> Forward:
    """Returns a forward that keeps the inputs of ``own`` alone for the backward pass."""

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(block, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            return own(block, *args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return forward


def hand_over_forward(own: Forward, run: RunBlock) -> Forward:
    """Returns a forward that lets ``run`` run ``own``."""

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(types.MethodType(own, block), *args, **kwargs)

    return forward
