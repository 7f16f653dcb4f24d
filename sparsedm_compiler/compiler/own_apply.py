"""What happens to the weights of a model in mode "infer" when it is moved or cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..graph.capture import KEY
from ..graph.names import strip_adapter_prefix
from .masked_model import MaskedModel
from .stand_in import StandIn
from .state_hooks import map_patterns, mask_stored


class OwnApply(StandIn):
    """``_apply``, by which the module is moved and cast.

    Folded weights are freed as soon as they are moved: a pipeline that offloads moves whole models
    off its card to make room for the next one. Weights are masked before they are cast, so that
    ties of the new dtype choose no other mask.
    """

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module = self.module
        own: Callable[..., Any] = type(module)._apply
        forward: MaskedModel | None = module.__dict__.get(KEY)
        if forward is not None and _casts(function, module):
            _mask_weights(module, forward)
        moved = own(module, function, *args, **kwargs)
        if forward is not None:
            forward.weights.release_moved()
        return moved


def install_apply(module: nn.Module) -> None:
    """Makes a compiled model in mode "infer" keep its masks, and free what was folded."""
    module.__dict__["_apply"] = OwnApply(module)


def _casts(function: Callable[..., Any], module: nn.Module) -> bool:
    """Returns whether a function gives one of the weights another dtype."""
    kinds = {(w.dtype, w.device) for w in module.parameters() if w.is_floating_point()}
    try:
        with torch.no_grad():
            return any(function(torch.empty(0, dtype=d, device=on)).dtype != d for d, on in kinds)
    except Exception:  # it is made for the weights themselves
        return False


@torch.no_grad()
def _mask_weights(module: nn.Module, forward: MaskedModel) -> None:
    """Sets the pruned values of weights that are not finalized to zero, in memory of their own."""
    patterns = map_patterns(module, forward.decisions)
    finalized = {name for name, _ in forward.weights.iterate_finalized(module)}
    for name, weight in module.named_parameters():
        if name in patterns and name not in finalized and not weight.is_meta:
            masked = forward.frozen.settle(weight, strip_adapter_prefix(name))
            if masked is None:
                masked = mask_stored(weight.detach(), patterns[name], name)
            weight.data = masked
