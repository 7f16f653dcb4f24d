"""``merge_lora``: adapters become part of pruned weights, which keep their pattern exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from ..errors import ConfigError
from ..graph.names import strip_adapter_prefix
from ..masks.nm_mask import apply_mask, nm_mask
from ..optional_deps import is_installed, mend_torchvision
from ..packed_tensors import explain_packed
from ..patterns import Pattern
from .held_masks import SoftMasks
from .lookup import masked_parameters, require_compiled
from .model_record import list_decisions


@dataclass(frozen=True, slots=True)
class MergedWeight:
    """What became of one weight that an adapter was merged into.

    Attributes:
        weight: The parameter's name in the model, without the adapter.
        pattern: Its pattern; None for one that stays dense, of which nothing is dropped.
        delta: The norm of what the adapter adds, relative to the norm of the masked weight.
        dropped: The norm of what the mask takes from the sum of the two, relative to the norm of
            what the adapter adds: 0 keeps it all.
    """

    weight: str
    pattern: Pattern | None
    delta: float
    dropped: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What merging adapters has dropped; ``str()`` is a table.

    Attributes:
        rows: One for every weight that an adapter was merged into.
    """

    rows: tuple[MergedWeight, ...]

    def __str__(self) -> str:
        head = ("weight", "pattern", "adapter / weight", "dropped / adapter")
        lines = [
            (row.weight, row.pattern or "dense", f"{row.delta:.4f}", f"{row.dropped:.4f}")
            for row in self.rows
        ]
        return tabulate(lines, head, disable_numparse=True)


def merge_lora(model: nn.Module, *, keep_masks: bool = False) -> MergeReport:
    """Merges the active adapters of a compiled model into its weights, in place and for good.

    A pruned weight W becomes ``mask * (mask_of_W * W + BA)``: what ran before, with the adapter
    added, pruned again to the same pattern. An adapter is dense, so that some of it is lost: the
    report says how much. The layers are those of before the adapter was added, and the model goes
    on as it was compiled; in mode "train" it may be trained on.

    Args:
        model: A model compiled in any mode, or a wrapper around one (a ``PeftModel``), with
            adapters of PEFT or of a diffusers pipeline. It must have been called once.
        keep_masks: Whether a weight keeps the mask that it has. The default chooses the mask of
            the sum, which drops the least. Frozen masks are always kept.

    Returns:
        The share of every adapter that its mask has dropped.

    Raises:
        ConfigError: If ``model`` was not compiled, has not been called, has no adapters or is
            finalized, or an adapter of another kind cannot be merged. Then it is as it was.
        MaskError: If a weight or an adapter holds NaN or Inf.
    """
    forwards = [forward for _, forward in require_compiled(model)]
    layers = list_adapted_layers(model)
    masked = masked_parameters(model)
    finalized = any(forward.weights.packed for forward in forwards)
    if not masked or not layers or finalized:
        state = "is finalized" if finalized else "has no adapter of PEFT"
        state = state if masked else "has chosen no weights yet: call it once first"
        raise ConfigError(f"{type(model).__name__} {state}, so there is nothing to merge")
    if any(isinstance(forward.frozen, SoftMasks) for forward in forwards):
        raise ConfigError(f"{type(model).__name__} has soft thresholds, not masks to keep")
    _check_layers(layers)
    copies = list_trained_copies(model)
    patterns = {id(weight): pattern for weight, pattern in masked.values()}
    fixed = {
        id(weight): forward.frozen.find_mask(strip_adapter_prefix(name), weight.device)
        for forward in forwards
        for name, weight in forward.module.named_parameters()
    }
    with torch.no_grad():
        merged = [
            _merge(name, layer, patterns.get(id(weight)), fixed.get(id(weight)), keep_masks)
            for name, layer in layers
            for weight in (layer.get_base_layer().weight,)
        ]
        for (_, layer), (_, values) in zip(layers, merged, strict=True):
            for parameter, value in zip(list_own_parameters(layer), values, strict=True):
                parameter.copy_(value)
    for name, layer in layers:
        _replace(model, name, layer.get_base_layer())
    for name, copied in copies:
        _replace(model, name, copied)
    for forward in forwards:
        forward.decisions = list_decisions(forward)
        # The marks of inject_adapter_in_model, and of diffusers.
        forward.module.__dict__.pop("peft_config", None)
        if "_hf_peft_config_loaded" in forward.module.__dict__:
            forward.module.__dict__["_hf_peft_config_loaded"] = False
    return MergeReport(tuple(row for row, _ in merged))


def list_adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Returns (name, layer) of the layers that an adapter of PEFT wraps."""
    if not is_installed("peft"):
        return []
    mend_torchvision()
    kind = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]


def list_trained_copies(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns (name, copy) of the layers that are trained whole: PEFT's ``modules_to_save``.

    Raises ConfigError for one whose copy is switched off.
    """
    kind = import_module("peft.utils").ModulesToSaveWrapper
    copies = []
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, kind):
            if wrapper.disable_adapters or not wrapper.active_adapters:
                raise ConfigError(
                    f"the trained copy of {name!r} (modules_to_save) is disabled: enable it first"
                )
            copies.append((name, wrapper.modules_to_save[wrapper.active_adapters[0]]))
    return copies


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer into the place of that name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def list_own_parameters(layer: Any) -> list[nn.Parameter]:
    """Returns the weight and, if there is one, the bias that an adapter is merged into."""
    base = layer.get_base_layer()
    return [base.weight] if base.bias is None else [base.weight, base.bias]


def _check_layers(layers: Sequence[tuple[str, Any]]) -> None:
    """Raises ConfigError for a layer whose adapter cannot be merged."""
    seen: dict[int, str] = {}
    for name, layer in layers:
        base = layer.get_base_layer()
        reason = None
        if not isinstance(base, (nn.Linear, nn.modules.conv._ConvNd)):
            reason = f"wraps a {type(base).__name__}, which is neither linear nor a convolution"
        elif explain_packed(base.weight) is not None:
            reason = f"is for a weight that is packed or quantized ({type(base.weight).__name__})"
        elif base.weight.is_meta:
            reason = "is offloaded: its weight is on the meta device"
        elif layer.merged:
            reason = "is merged already, into a weight without its mask: unmerge it first"
        elif layer.disable_adapters:
            reason = "is disabled: enable it, or remove it"
        elif id(base.weight) in seen:
            reason = f"is for a weight that {seen[id(base.weight)]!r} shares"
        if reason is not None:
            raise ConfigError(f"the adapter at {name!r} cannot be merged: it {reason}")
        seen[id(base.weight)] = name


def _merge(
    name: str, layer: Any, pattern: Pattern | None, fixed: Tensor | None, keep_masks: bool
) -> tuple[MergedWeight, list[Tensor]]:
    """Returns the row of a layer, and its merged weight and bias; the layer stays as it is.

    ``fixed``: the mask of the weight, if that is frozen.
    """
    parameters = list_own_parameters(layer)
    before = [parameter.data for parameter in parameters]
    mask = fixed
    if fixed is None and pattern is not None:
        mask = nm_mask(before[0], pattern, name=name)
    start = before[0] if mask is None else apply_mask(before[0], mask)
    try:
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        parameters[0].data = start.clone()
        layer.merge(safe_merge=True)
        values = [parameter.data for parameter in parameters]
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"the adapter at {name!r} cannot be merged: {error}") from error
    finally:
        layer.merged_adapters.clear()
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data
    added = (values[0] - start).double().norm().item()
    dropped = 0.0
    if mask is not None and pattern is not None:
        if fixed is None and not keep_masks:
            mask = nm_mask(values[0], pattern, name=name)
        kept = apply_mask(values[0], mask)
        dropped = (values[0] - kept).double().norm().item()
        values[0] = kept
    size = start.double().norm().item()
    row = MergedWeight(f"{name}.weight", pattern, added / (size or 1), dropped / (added or 1))
    return row, values
