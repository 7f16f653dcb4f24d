"""Rewritten graph -> a callable: the inner compiler, and folded weights in the place of dense."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import list_backends, lookup_backend

from .config import Inner
from .errors import ConfigError, DenseRunError
from .masks import kept, nm_mask
from .pattern import Pattern

Run = Callable[..., Any]


def lower(gm: fx.GraphModule, example_inputs: Sequence[Any], inner: Inner) -> Run:
    """The graph as the inner compiler runs it."""
    backend = inner if callable(inner) else lookup_backend(resolve(inner))
    run: Run = backend(gm, list(example_inputs))
    return run


def resolve(inner: str) -> str:
    """The torch.compile backend that ``inner`` names; "auto" depends on the machine.

    Raises ConfigError for a name that torch does not know.
    """
    if inner == "auto":
        return "inductor" if has_compiler() else "eager"
    if inner not in list_backends(exclude_tags=()) or inner == "sparsedm":
        raise ConfigError(
            f"inner {inner!r} is no torch.compile backend; "
            f"'auto', 'eager' and 'inductor' are, e.g. inner='eager'"
        )
    return inner


@cache
def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler here."""
    from torch._inductor import config

    candidates = config.cpp.cxx
    names = candidates if isinstance(candidates, (tuple, list)) else (candidates,)
    return any(name is not None and shutil.which(name) is not None for name in names)


class Folded:
    """Runs a graph with its accepted weights replaced by masked ones, folded once.

    A weight changed since (in place, or replaced) is folded again at the next call. The masked
    weight has no gradient, so a call that would need one raises DenseRunError.
    """

    def __init__(self, run: Run, patterns: Mapping[int, Pattern], names: Mapping[int, str]) -> None:
        self.run = run
        self.patterns = patterns
        self.names = names
        self._folds: dict[int, tuple[weakref.ref[Tensor], int, int, Tensor]] = {}

    def __call__(self, *inputs: Any) -> Any:
        given = list(inputs)
        for place in self.patterns:
            given[place] = self._fold(place, given[place])
        return self.run(*given)

    def _fold(self, place: int, weight: Tensor) -> Tensor:
        if weight.requires_grad and torch.is_grad_enabled():
            raise DenseRunError(
                f"{self.names[place]!r} asks for a gradient, but mode='infer' has folded its mask; "
                "train with mode='train', or call under torch.no_grad()"
            )
        version = 0 if weight.is_inference() else weight._version
        fold = self._folds.get(place)
        if fold and fold[0]() is weight and fold[1:3] == (version, weight.data_ptr()):
            return fold[3]
        with torch.no_grad():
            mask = nm_mask(weight, self.patterns[place], name=self.names[place])
            folded = kept(weight.detach(), mask)
        self._folds[place] = (weakref.ref(weight), version, weight.data_ptr(), folded)
        return folded
