"""``freeze_masks``: the masks of a student stay what they are now, and pruned weights zero."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..graph.names import strip_adapter_prefix
from ..masks.nm_mask import nm_mask
from ..meta_models import require_values
from ..optimizer_state import clear_where, find_state
from ..patterns import Pattern
from .api import install
from .frozen_masks import FrozenMasks, write_frozen_masks
from .guarded_forward import SparseForward
from .lookup import require_compiled


def freeze_masks(
    model: nn.Module, *, optimizer: Optimizer | None = None, like: nn.Module | None = None
) -> tuple[str, ...]:
    """Keeps the masks of a student as they are now, for the rest of its training.

    Pruned weights become exactly zero, and so do their gradients in every backward from now on:
    only kept weights learn. No mask is computed any more, and with ``kernels={"*": "sparse"}`` a
    block pattern skips pruned blocks in all three products of a step. The next call compiles the
    model once more. Copies of the model (an EMA's), ``save`` and ``load`` keep the masks; compiling
    it for inference writes them into the weights; ``repattern`` and ``unfreeze_masks`` drop them.

    A second call freezes what was not pruned yet at the first, sets pruned weights to zero again,
    and changes nothing else.

    Args:
        model: A model compiled in mode "train" that has been called, or a wrapper around one (DDP,
            torch.compile). Where its parameters are sharded, every process must call this.
        optimizer: The optimizer that steps the parameters: what it remembers of pruned weights
            (momentum) is set to zero, so that it does not move them. None for an optimizer that
            has not stepped yet; any other would move pruned weights, which no call reads.
        like: A model with frozen masks, of the same class, to take them from: the student, for an
            EMA that was copied from it before. None for the masks of ``model`` itself.

    Returns:
        The names of the weights whose masks are frozen.

    Raises:
        ConfigError: If ``model`` was not compiled in mode "train", or has not been called yet, or
            ``like`` is no model of its sort with frozen masks.
        MaskError: If a weight holds NaN or Inf.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> _ = student(torch.randn(1, 8))
        >>> sdm.freeze_masks(student)
        ('1.weight',)
        >>> student(torch.randn(1, 8)).sum().backward()
        >>> int((student[1].weight == 0).sum()), int((student[1].weight.grad == 0).sum())
        (32, 32)
    """
    if like is not None:
        _take_masks(model, like)
    frozen = []
    for prefix, forward in require_compiled(model):
        require_trained(forward)
        masks: dict[str, Tensor] = {}
        temporary = forward.frozen.are_temporary
        if temporary:
            write_frozen_masks(forward.module, forward.frozen)
        for name, weight, pattern in list_pruned(forward):
            mask = forward.frozen.find_mask(name, weight.device)
            if mask is None:
                mask = nm_mask(gather_weight(weight.detach()), pattern, name=prefix + name)
            masks[name] = mask
            _clear_pruned(weight, mask, optimizer)
            frozen.append(prefix + name)
        if temporary or any(name not in forward.frozen for name in masks):
            install_masks(forward, FrozenMasks(masks))
    return tuple(frozen)


def unfreeze_masks(model: nn.Module) -> None:
    """Lets the masks of a student follow its weights again, from its next call on.

    Pruned weights are zero at first, and get gradients again (straight-through). Held masks
    (``hold_masks``) and soft thresholds (``soften_masks``) end as well, with weights as they are.

    Args:
        model: A compiled model, or a wrapper around one. Nothing happens where no mask is frozen.

    Raises:
        ConfigError: If ``model`` was not compiled.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> _ = student(torch.randn(1, 8))
        >>> sdm.freeze_masks(student)
        ('1.weight',)
        >>> sdm.unfreeze_masks(student)
        >>> sdm.explain(student).frozen
        ()
    """
    for _, forward in require_compiled(model):
        if forward.frozen:
            install_masks(forward, FrozenMasks())


def _take_masks(model: nn.Module, like: nn.Module) -> None:
    """Gives the compiled modules of a model the decisions and frozen masks of those of another."""
    ours = [forward for _, forward in require_compiled(model)]
    theirs = [forward for _, forward in require_compiled(like)]
    kinds = [[type(forward.module) for forward in forwards] for forwards in (ours, theirs)]
    if kinds[0] != kinds[1] or not all(forward.frozen.frozen_names for forward in theirs):
        raise ConfigError(
            f"like= is a {type(like).__name__}, not a copy of this {type(model).__name__} whose "
            "masks are frozen: freeze those first"
        )
    for forward, source in zip(ours, theirs, strict=True):
        if not forward.frozen.equals(source.frozen):
            forward.decisions.update(source.decisions)
            install_masks(forward, copy.deepcopy(source.frozen))


def install_masks(forward: SparseForward, frozen: FrozenMasks) -> None:
    """Gives a compiled module these masks; its graphs are captured anew."""
    install(forward.module, forward.config, forward.decisions, forward.known, frozen=frozen)


def require_trained(forward: SparseForward) -> None:
    """Raises ConfigError unless a module is compiled for training and has decided on weights."""
    name = type(forward.module).__name__
    if forward.config.mode != "train":
        raise ConfigError(
            f"{name} is folded for inference, where masks do not change; freeze the student in "
            "mode 'train'"
        )
    require_values(forward.module, "freezing its masks")
    if not any(decision.accepted for decision in forward.decisions.values()):
        raise ConfigError(f"{name} has chosen no weights yet: call it once first")


def list_pruned(forward: SparseForward) -> list[tuple[str, nn.Parameter, Pattern]]:
    """Returns (name as decisions have it, parameter, pattern) of the pruned weights."""
    pruned = []
    for name, weight in forward.module.named_parameters():
        decision = forward.decisions.get(strip_adapter_prefix(name))
        if decision is not None and decision.pattern is not None:
            pruned.append((decision.weight, weight, decision.pattern))
    return pruned


@torch.no_grad()
def _clear_pruned(weight: nn.Parameter, mask: Tensor, optimizer: Optimizer | None) -> None:
    """Sets to zero what a mask prunes: of the weight, its gradient and its optimizer state."""
    state = find_state(optimizer, weight)
    pruned = _shard_like(mask, weight).logical_not()
    for tensor in (weight.detach(), weight.grad):
        if tensor is not None:
            tensor.masked_fill_(pruned.to(tensor.device), 0)
    clear_where(pruned, state)


def _is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is spread over processes."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gather_weight(weight: Tensor) -> Tensor:
    """Returns all rows of a weight, which may be spread over processes."""
    return weight.full_tensor() if _is_sharded(weight) else weight  # type: ignore[attr-defined]


def _shard_like(mask: Tensor, like: Tensor) -> Tensor:
    """Returns a whole mask, spread over processes as ``like`` is, on its device."""
    if not _is_sharded(like):
        return mask.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    whole = mask.to(like.device).contiguous()
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
