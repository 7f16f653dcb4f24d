"""What state_dict and load_state_dict do with the weights of a model in mode "infer"."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.kernel_family import WeightFormat
from ..backends.packing import fold_weight
from ..graph.capture import KEY, Names, map_parameter_names
from ..graph.names import strip_adapter_prefix
from ..masks.nm_mask import nm_mask
from ..patterns import Pattern
from ..reports import Decision
from ..selection.top_n import KEYS
from .masked_model import MaskedModel
from .root_hook import RootHook


class PartHook(RootHook):
    """Saves one layer of the compiled model ``root`` masked, where a part is saved by itself.

    ``names``: of the layer's weights in the root, by their names in the layer.
    """

    _from_public_api = True  # torch notes it when a hook is registered, as those of copies are not

    def __init__(self, root: nn.Module | None, names: Mapping[str, Names]) -> None:
        super().__init__(root, names)
        self._names = names

    def __call__(
        self, layer: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any
    ) -> None:
        forward: MaskedModel | None = self.forward
        if forward is None or forward.config.mode != "infer":
            return
        for leaf, names in self._names.items():
            name = next(filter(forward.decisions.get, map(strip_adapter_prefix, names)), None)
            weight, key = layer._parameters.get(leaf), prefix + leaf
            if name is None or weight is None or key not in state:
                continue
            pattern = forward.decisions[name].pattern
            packed = forward.weights.find_finalized(weight, name)
            if packed is not None:
                state[key] = packed.unpack()
            elif pattern and not weight.is_meta and state[key].data_ptr() == weight.data_ptr():
                state[key] = mask_stored(weight.detach(), pattern, name)

    def unpack(self, *_: Any) -> None:
        """Gives finalized weights their memory back before a part of them is loaded."""
        root = self.root
        if root is not None:
            _unpack_before_load(root)


def install_state_hooks(module: nn.Module) -> None:
    """Makes a module and its parts save masked weights, and finalized ones take new values."""
    by_id = map_parameter_names(module)
    for layer in module.modules():
        weights = ((k, w) for k, w in layer._parameters.items() if w is not None and w.dim() > 1)
        names = {leaf: by_id[id(weight)] for leaf, weight in weights}
        if names and layer is not module:
            _install_part(PartHook(module, names), layer)
    if _fill_state_dict not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_fill_state_dict)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_unpack_before_load)  # type: ignore[no-untyped-call]


def _install_part(part: PartHook, layer: nn.Module) -> None:
    """Puts a layer's hooks into the place of those that it has."""
    _remove(_is_of_part, layer)
    layer.register_state_dict_post_hook(part)  # type: ignore[no-untyped-call]
    layer.register_load_state_dict_pre_hook(part.unpack)  # type: ignore[no-untyped-call]


def remove_state_hooks(module: nn.Module) -> None:
    """Removes what ``install_state_hooks`` has added, from a copy of a compiled model."""
    for layer in module.modules():
        _remove(_is_of_part, layer)
    _remove((_fill_state_dict, _unpack_before_load).__contains__, module)


def _is_of_part(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", hook), PartHook)


def _remove(is_ours: Callable[[Any], bool], layer: nn.Module) -> None:
    for hooks in (layer._state_dict_hooks, layer._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if is_ours(getattr(hook, "hook", hook)):  # torch wraps those that are called first
                del hooks[key]


def _unpack_before_load(module: nn.Module, *_: Any) -> None:
    """Gives finalized weights their memory back before new values are loaded."""
    forward: MaskedModel | None = module.__dict__.get(KEY)
    if forward is not None:
        forward.weights.unpack_finalized(module)


def _fill_state_dict(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Saves pruned weights as the masked dense weights."""
    forward: MaskedModel | None = module.__dict__.get(KEY)
    if forward is None or forward.config.mode != "infer":
        return
    forward.weights.fill_state_dict(module, state, prefix)
    if not forward.decisions:
        warnings.warn(
            f"{type(module).__name__} has not been called since compile(mode='infer'), so no "
            "weight is chosen yet and its state_dict is dense; call it once first",
            stacklevel=3,
        )
    mask_state_dict(module, forward.decisions, state, prefix)


def mask_state_dict(
    module: nn.Module, decisions: Mapping[str, Decision], state: dict[str, Any], prefix: str = ""
) -> None:
    """Replaces pruned weights in a state_dict by the masked dense ones; finalized ones stay."""
    masked: dict[int, Tensor] = {}
    patterns = map_patterns(module, decisions)
    for name, weight in module.named_parameters(remove_duplicate=False):
        key = prefix + name
        if name not in patterns or key not in state:
            continue
        if weight.is_meta or state[key].data_ptr() != weight.data_ptr():
            continue
        if id(weight) not in masked:
            masked[id(weight)] = mask_stored(weight.detach(), patterns[name], name)
        state[key] = masked[id(weight)]


def mask_stored(weight: Tensor, pattern: Pattern, name: str) -> Tensor:
    """Returns a weight masked, also one that is stored in float8 (layerwise casting)."""
    if weight.dtype in KEYS:
        return fold_weight(weight, WeightFormat(pattern), name)
    mask = nm_mask(weight.float(), pattern, name=name)
    return weight.view(torch.uint8).masked_fill(~mask, 0).view(weight.dtype)


def map_patterns(module: nn.Module, decisions: Mapping[str, Decision]) -> dict[str, Pattern]:
    """Returns {name: pattern} of the pruned weights, under every name of a tied one."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    accepted = {
        id(weight): decision.pattern
        for name, weight in weights.items()
        if (decision := decisions.get(strip_adapter_prefix(name))) is not None
        and decision.pattern is not None
    }
    return {name: accepted[id(w)] for name, w in weights.items() if id(w) in accepted}
