"""A hook on a part of a compiled model, which knows the whole."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ..graph.capture import KEY


class RootHook:
    """A hook on a layer of the compiled model ``root``, with what else it is made from.

    A copy of the whole model has hooks of its own. A copy of a part of it is an ordinary module.
    """

    def __init__(self, root: nn.Module | None, *rest: Any) -> None:
        self._root = None if root is None else weakref.ref(root)
        self._rest = rest

    @property
    def root(self) -> nn.Module | None:
        """The compiled model; None for a hook of a copied or unpickled part."""
        return None if self._root is None else self._root()

    @property
    def forward(self) -> Any:
        """The guarded forward of the compiled model; None where there is none."""
        root = self.root
        return None if root is None else root.__dict__.get(KEY)

    def __deepcopy__(self, memo: dict[int, Any]) -> RootHook:
        root = self.root
        return type(self)(None if root is None else memo.get(id(root)), *self._rest)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, *self._rest)
