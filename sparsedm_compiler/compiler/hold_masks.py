"""``hold_masks``, ``soften_masks`` and ``get_masks``: masks that training decides on itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MaskError
from ..masks.held_mask import compute_scale, require_soft
from ..masks.nm_mask import nm_mask
from ..patterns import Pattern
from .freeze_masks import gather_weight, install_masks, list_pruned, require_trained
from .guarded_forward import SparseForward
from .held_masks import HeldMasks, SoftMasks
from .lookup import require_compiled


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> tuple[str, ...]:
    """Keeps the masks of a student until the next call of this function.

    Gradients still reach pruned weights (straight-through), so that the next call may choose other
    masks; between two calls no mask is computed, which makes masks k times cheaper where it is
    called every k steps. The first call compiles the model once more. A copy of the model holds
    masks of its own; ``save`` does not keep them; ``unfreeze_masks`` ends it.

    Args:
        model: A model compiled in mode "train" that has been called, or a wrapper around one.
            Where its parameters are sharded, every process must call this.
        masks: A bool tensor of the weight's shape for every masked weight, by the names of
            ``masked_parameters``; they are not checked against the pattern. None computes those of
            the weights as they are now.

    Returns:
        The names of the weights whose masks are held.

    Raises:
        ConfigError: ``model`` was not compiled in mode "train", has not been called yet, or its
            masks are frozen.
        MaskError: A weight holds NaN or Inf, or ``masks`` lack a weight or fit none.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> _ = student(torch.randn(1, 8))
        >>> for step in range(20):
        ...     if step % 10 == 0:
        ...         names = sdm.hold_masks(student)
        ...     student(torch.randn(1, 8)).sum().backward()
        >>> names
        ('1.weight',)
    """
    held = []
    for prefix, forward in require_compiled(model):
        _require_unfrozen(forward)
        chosen = {}
        for name, weight, pattern in list_pruned(forward):
            whole = gather_weight(weight.detach())
            if masks is None:
                mask = nm_mask(whole, pattern, name=prefix + name)
            else:
                mask = _take_mask(masks, prefix + name, whole)
            chosen[name] = mask.clone()
            held.append(prefix + name)
        if isinstance(forward.frozen, HeldMasks) and {*forward.frozen} == {*chosen}:
            forward.frozen.write(chosen)
        else:
            install_masks(forward, HeldMasks(chosen))
    return tuple(held)


def soften_masks(model: nn.Module, scales: Mapping[str, float] | None = None) -> dict[str, float]:
    """Trains a student by S-STE: kept weights are shrunk by the largest pruned magnitude.

    A weight runs as ``beta S(w)`` (Hu et al. 2024): in every group, S moves each kept weight
    towards zero by the largest magnitude that is pruned, so that nothing jumps where the mask
    changes. ``beta`` is one fixed number per weight, with which ``beta S(w)`` is nearest to w at
    this call. ``freeze_masks``, ``apply_masks`` and compiling for inference write ``beta S(w)``
    into the weights; ``save`` and ``load`` keep the scales; ``unfreeze_masks`` ends it.

    Args:
        model: A model compiled in mode "train" that has been called, or a wrapper around one.
        scales: beta of every masked weight, by the names of ``masked_parameters``; None computes
            them.

    Returns:
        The scales by name.

    Raises:
        ConfigError: ``model`` was not compiled in mode "train", has not been called yet, its masks
            are frozen, or ``scales`` lack a weight.
        PatternError: A weight has another pattern than a per-row "n:m".

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> _ = student(torch.randn(1, 8))
        >>> scales = sdm.soften_masks(student)
        >>> scales["1.weight"] > 1
        True
    """
    used = {}
    for prefix, forward in require_compiled(model):
        _require_unfrozen(forward)
        chosen: dict[str, Tensor] = {}
        patterns: dict[str, Pattern] = {}
        for name, weight, pattern in list_pruned(forward):
            require_soft(pattern)
            if scales is not None and prefix + name not in scales:
                raise ConfigError(f"the scales of soft thresholds lack {prefix + name!r}")
            if scales is None:
                scale = compute_scale(gather_weight(weight.detach()), pattern)
            else:
                scale = torch.tensor([scales[prefix + name]], device=weight.device)
            chosen[name], patterns[name] = scale, pattern
            used[prefix + name] = float(scale)
        install_masks(forward, SoftMasks(chosen, patterns))
    return used


def get_masks(model: nn.Module, *, fixed: bool = False) -> dict[str, Tensor]:
    """Returns the masks of a student, as its next call uses them.

    Args:
        model: A compiled model that has been called, or a wrapper around one.
        fixed: Whether to return only masks that are not computed anew in every call: frozen and
            held ones.

    Returns:
        {parameter name in ``model``: bool tensor of the weight's shape}, True for kept weights. Of
        a sharded weight it is the mask of all rows.

    Raises:
        ConfigError: ``model`` was not compiled.
        MaskError: A weight holds NaN or Inf.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> _ = student(torch.randn(1, 8))
        >>> int(sdm.get_masks(student)["1.weight"].sum()), sdm.get_masks(student, fixed=True)
        (32, {})
    """
    masks = {}
    for prefix, forward in require_compiled(model):
        for name, weight, pattern in list_pruned(forward):
            mask = forward.frozen.find_mask(name, weight.device)
            if mask is None and not fixed:
                mask = nm_mask(gather_weight(weight.detach()), pattern, name=prefix + name)
            if mask is not None:
                masks[prefix + name] = mask
    return masks


def _require_unfrozen(forward: SparseForward) -> None:
    """Raises ConfigError unless a module is trained and its masks may change."""
    require_trained(forward)
    if forward.frozen.frozen_names:
        raise ConfigError(
            f"the masks of {type(forward.module).__name__} are frozen: unfreeze_masks(model) first"
        )


def _take_mask(masks: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
    mask = masks.get(name)
    if mask is None or mask.shape != weight.shape or mask.dtype != torch.bool:
        form = "missing" if mask is None else f"{list(mask.shape)} of {mask.dtype}"
        raise MaskError(f"the mask of {name!r} is {form}, not a bool tensor {list(weight.shape)}")
    return mask.to(weight.device)
