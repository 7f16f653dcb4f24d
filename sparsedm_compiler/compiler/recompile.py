"""What a compiled model hands on when it is compiled again."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..config import CompileConfig
from ..errors import ConfigError
from ..graph.capture import KEY, wraps_forward
from ..graph.stateful_hooks import has_diffusers_hooks
from .guarded_forward import SparseForward
from .read_guard import describe_function

Model = TypeVar("Model", bound=nn.Module)

_CHOICE = ("pattern", "keep_dense", "overrides", "policy")
"""The options that choose the weights and their patterns."""


def find_compiled(model: nn.Module) -> SparseForward | None:
    """Returns the guarded forward of a model that was compiled; None for any other."""
    forward = model.__dict__.get(KEY)
    return forward if isinstance(forward, SparseForward) and forward.module is model else None


def copy_model(model: Model) -> Model:
    """Returns a deep copy. Raises ConfigError where the model cannot be copied faithfully."""
    compiled = find_compiled(model)
    hooked = [name for name, module in model.named_modules() if has_diffusers_hooks(module)]
    if hooked:
        raise ConfigError(
            f"{hooked[0] or type(model).__name__!r} has hooks of diffusers (of a cache, casting or "
            "offloading), and a copy's would run the layers of the model itself: enable them on "
            "what compile or load returns, or compile with inplace=True"
        )
    try:
        student = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(_explain_uncopied(model, error)) from error
    again = find_compiled(student)
    if compiled is None or again is None:
        return student
    again.weights.unpack_finalized(student)
    if wraps_forward(model, compiled) and not wraps_forward(student, again):
        raise ConfigError(
            f"the forward of {type(model).__name__} is wrapped by "
            f"{describe_function(model.__dict__['forward'])}, which a copy would share with the "
            "model: unwrap it first (accelerator.unwrap_model(model, keep_fp32_wrapper=False)), "
            "or compile with inplace=True"
        )
    return student


def _explain_uncopied(model: nn.Module, error: Exception) -> str:
    """Returns why ``copy.deepcopy`` failed, with the layers whose weights are computed."""
    pruned = [name for name, m in model.named_modules() if _lists_hooks_of(m, "BasePruningMethod")]
    normed = [name for name, m in model.named_modules() if _lists_hooks_of(m, "WeightNorm")]
    if pruned:
        return (
            f"{pruned[0]!r} was pruned by torch.nn.utils.prune, whose masks cannot be copied: "
            "torch.nn.utils.prune.remove(layer, 'weight') makes them zeros of the weight"
        )
    if normed:
        return (
            f"{normed[0]!r} has the old weight_norm, which cannot be copied: "
            "torch.nn.utils.remove_weight_norm(layer) makes its weight a parameter again"
        )
    return f"{type(model).__name__} cannot be copied, inplace=True does without: {error}"


def _lists_hooks_of(module: nn.Module, kind: str) -> bool:
    """Returns whether a forward pre-hook of a module is of a class of torch.nn.utils."""
    return any(
        kind in {base.__name__ for base in type(hook).__mro__}
        for hook in module._forward_pre_hooks.values()
    )


def inherit_choice(
    before: CompileConfig, config: CompileConfig, chosen: tuple[Any, Any, Any]
) -> CompileConfig:
    """Returns ``config`` with the earlier choice of weights for options that were not given.

    Args:
        before: The configuration that the model was compiled with.
        config: The new one.
        chosen: keep_dense, overrides and policy as the caller gave them, None where not.
    """
    earlier = {
        name: getattr(before, name)
        for name, value in zip(_CHOICE[1:], chosen, strict=True)
        if value is None
    }
    return replace(config, **earlier)


def warn_of_changes(before: CompileConfig, config: CompileConfig) -> bool:
    """Returns whether two configurations prune the same weights, and warns if they do not."""
    changes = [
        f"{name} {_show(getattr(before, name))} became {_show(getattr(config, name))}"
        for name in _CHOICE
        if getattr(before, name) != getattr(config, name)
    ]
    if changes:
        warnings.warn(
            f"this prunes other weights than the student was compiled for: {'; '.join(changes)}",
            stacklevel=3,
        )
    return not changes


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return repr(
            tuple(
                str(part) if not isinstance(part, tuple) else f"{part[0]}={part[1]}"
                for part in value
            )
        )
    return str(value)
