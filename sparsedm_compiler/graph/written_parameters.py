"""Parameters that a run writes which is to be undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .flat_graph import may_write

SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class WrittenParameters:
    """The values that parameters had before a run wrote to them in place."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._by_storage: dict[int, nn.Parameter] | None = None
        self._before: dict[int, tuple[nn.Parameter, Tensor, Tensor]] = {}

    def note(self, function: Any, args: Any) -> None:
        """Keeps the values of parameters that a call is about to write."""
        if not args or not (function == SET_DATA or may_write(function)):
            return
        written = args[0] if isinstance(args[0], (tuple, list)) else args[:1]
        with torch._C.DisableTorchFunction():
            for parameter in map(self._find, written):
                if parameter is not None and id(parameter) not in self._before:
                    data = parameter.data
                    self._before[id(parameter)] = parameter, data, data.clone()

    def _find(self, value: Any) -> nn.Parameter | None:
        """Returns the parameter that a tensor is, or shares its memory with."""
        if isinstance(value, nn.Parameter):
            return value
        if type(value) is not Tensor or value.layout is not torch.strided:
            return None
        if self._by_storage is None:
            self._by_storage = {
                parameter.untyped_storage().data_ptr(): parameter
                for parameter in self._module.parameters()
                if type(parameter) is nn.Parameter
            }
        return self._by_storage.get(value.untyped_storage().data_ptr() or -1)

    def restore(self) -> None:
        """Gives all of them their values back, where these lay."""
        with torch._C.DisableTorchFunction():
            for parameter, data, values in self._before.values():
                parameter.data = data.copy_(values)
        self._before.clear()
