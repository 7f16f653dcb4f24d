"""How a compiled model is copied and pickled.

As any module, but where its ``__dict__``, in which ours refer to the module, is no state to be read
back: a class may hand it to a function that makes the module (EDM's persistent classes), so that
the copy would be asked for while it is being made; and a bound method, as which accelerate wraps
a forward, is read back as the method that the class has.
"""

from __future__ import annotations

import copy
import types
from typing import Any

from torch import nn

from ..graph.capture import KEY, OwnForward
from .sparse_method import SparseMethod
from .stand_in import StandIn


class OwnCopy(StandIn):
    """``__deepcopy__``, which copies the module as any other, or as its class does."""

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        module = self.module
        own = getattr(type(module), "__deepcopy__", None)
        if own is not None:  # fx.GraphModule
            copied = memo[id(module)] = own(_strip(module), memo)
            return _install(copied, *copy.deepcopy(_get_state(module), memo))
        copied = object.__new__(type(module))
        memo[id(module)] = copied
        get_state = getattr(module, "__getstate__", None)  # every object has it from Python 3.11 on
        state = module.__dict__ if get_state is None else get_state()
        copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied


class OwnReduce(StandIn):
    """``__reduce_ex__``, by which the module is pickled."""

    def __call__(self, protocol: int) -> Any:
        module = self.module
        if not (_reduces_itself(module) or _is_bound(module.__dict__.get("forward"), module)):
            return type(module).__reduce_ex__(module, protocol)
        return _install, (_strip(module), *_get_state(module))


def install_own_copies(module: nn.Module) -> None:
    """Lets a compiled model be copied and pickled, whatever its class and wrappers do."""
    if _reduces_itself(module) or not hasattr(type(module), "__deepcopy__"):
        module.__dict__["__deepcopy__"] = OwnCopy(module)
    module.__dict__["__reduce_ex__"] = OwnReduce(module)


def _reduces_itself(module: nn.Module) -> bool:
    cls = type(module)
    return (cls.__reduce__, cls.__reduce_ex__) != (object.__reduce__, object.__reduce_ex__)


def _is_bound(value: Any, module: nn.Module) -> bool:
    return isinstance(value, types.MethodType) and value.__self__ is module


def _strip(module: nn.Module) -> nn.Module:
    """Returns a module of the same parameters and layers without what ``compile`` has set on it.

    Nor has it what is bound to the module, which a file does not keep either.
    """
    plain: nn.Module = object.__new__(type(module))
    for name, value in module.__dict__.items():
        kept = value.override if isinstance(value, SparseMethod) else value
        if isinstance(kept, (OwnForward, StandIn)) or _is_bound(kept, module):
            continue
        if kept is value or kept is not None:
            plain.__dict__[name] = kept
    return plain


def _get_state(module: nn.Module) -> tuple[Any, ...]:
    """Returns what ``_install`` takes: the class of the forward, and what it is made from."""
    cls, (_, config, known, decisions, override, *rest) = module.__dict__[KEY].__reduce__()
    override = None if _is_bound(override, module) else override
    return cls, config, known, decisions, override, *rest


def _install(module: nn.Module, cls: Any, *state: Any) -> nn.Module:
    """Makes a copied or unpickled module a compiled one."""
    cls(module, *state).install(wrapped="forward" in module.__dict__)
    return module
