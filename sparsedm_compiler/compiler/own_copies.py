"""Copies and pickles of a compiled model whose class makes its own, as EDM's persistent ones do.

Such a class hands its ``__dict__`` to a function that makes the module. Ours lies in that
``__dict__`` and refers to the module, so the copy would be asked for while it is being made.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..graph.capture import KEY, OwnForward
from .release_on_move import ReleasingApply
from .sparse_method import SparseMethod


class OwnCopy:
    """Stands in for ``__deepcopy__``: copies the module as any other."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        module = self._module
        copied = type(module).__new__(type(module))
        memo[id(module)] = copied
        get_state = getattr(module, "__getstate__", None)  # every object has it from Python 3.11 on
        state = module.__dict__ if get_state is None else get_state()
        copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied


class OwnReduce:
    """Stands in for ``__reduce_ex__``: its class pickles the module as ``compile`` met it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, protocol: int) -> tuple[Any, ...]:
        cls, (module, *state) = self._module.__dict__[KEY].__reduce__()
        return _install, (cls, _strip(module), *state)


def install_own_copies(module: nn.Module) -> None:
    """Lets a compiled model be copied and pickled if its class does both in its own way."""
    cls = type(module)
    if (cls.__reduce__, cls.__reduce_ex__) != (object.__reduce__, object.__reduce_ex__):
        module.__dict__["__deepcopy__"] = OwnCopy(module)
        module.__dict__["__reduce_ex__"] = OwnReduce(module)


def _strip(module: nn.Module) -> nn.Module:
    """Returns a module of the same parameters and layers without what ``compile`` has set on it."""
    plain = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        if isinstance(value, SparseMethod) and value.override is not None:
            plain.__dict__[name] = value.override
        elif not isinstance(value, (SparseMethod, OwnForward, ReleasingApply, OwnCopy, OwnReduce)):
            plain.__dict__[name] = value
    return plain


def _install(cls: Any, module: nn.Module, *state: Any) -> nn.Module:
    """Makes a module from a file a compiled one."""
    cls(module, *state).install(wrapped="forward" in module.__dict__)
    return module
