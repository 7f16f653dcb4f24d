"""state_dict of a module whose dense weights may be gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..graph.names import strip_adapter_prefix
from .folded_weights import FoldedWeights, PackedWeight

KEY = "_sparsedm"
"""Where a compiled module keeps its SparseForward, beside ``forward``, in its ``__dict__``."""


def named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters, each under every name, as decisions name them."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield strip_adapter_prefix(name), parameter


def finalized(module: nn.Module, folds: FoldedWeights) -> Iterator[tuple[str, PackedWeight]]:
    """(name in the module, packed weight) of what was finalized; every name of a tied one."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        packed = folds.finalized(parameter, strip_adapter_prefix(name))
        if packed is not None:
            yield name, packed


def fill_packed(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A state_dict hook: what was finalized is saved as the masked dense weight it stands for."""
    for name, packed in finalized(module, module.__dict__[KEY].folding.folds):
        if prefix + name in state:
            state[prefix + name] = packed.dense()


def without_finalized(module: nn.Module, folds: FoldedWeights) -> dict[str, Tensor]:
    """The state_dict of a module without its finalized weights."""
    left_out = {name for name, _ in finalized(module, folds)}
    hooks, module._state_dict_hooks = module._state_dict_hooks, OrderedDict()
    try:
        state = module.state_dict()
    finally:
        module._state_dict_hooks = hooks
    return {name: tensor for name, tensor in state.items() if name not in left_out}
