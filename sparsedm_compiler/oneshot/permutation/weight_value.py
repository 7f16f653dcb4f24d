"""A parameter in a graph, whose channels are its rows and columns, or else all its elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .channel_log import Axis, ChannelLog, number_elements

MIXED = "it is read as a matrix and in another way as well"


@dataclass(slots=True)
class StoredTensor:
    """A parameter or buffer, with the axes that its readers asked for.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        state: Whether it is a buffer, which only a norm's statistics may be permuted with.
        matrix: The axes of its rows and columns; None until it is read as a matrix.
        elements: The axis of its elements; None until it is read in another way.
    """

    name: str
    shape: tuple[int, ...]
    state: bool = False
    matrix: tuple[Axis, Axis] | None = None
    elements: Axis | None = None


@dataclass(frozen=True, slots=True)
class WeightValue:
    """A node that holds a parameter, or casts and views of it.

    Attributes:
        stored: The parameter.
        log: Where its atoms are kept.
        moves: What was done to it, to be done to its labels.
    """

    stored: StoredTensor
    log: ChannelLog
    moves: tuple[Callable[[Tensor], Tensor], ...] = field(default=())

    def move(self, change: Callable[[Tensor], Tensor]) -> WeightValue:
        """Returns the value after an op that only moves elements."""
        return replace(self, moves=(*self.moves, change))

    def get_planes(self) -> tuple[Tensor, Tensor]:
        """Returns the labels of rows and of columns, both in the shape of the value."""
        stored, shape = self.stored, self.stored.shape
        if stored.matrix is None:
            rows = self.log.add_axis(stored.name, 0, shape[0])
            columns = self.log.add_axis(stored.name, 1, shape[1])
            stored.matrix = rows, columns
        planes = []
        for dim, axis in enumerate(stored.matrix):
            size = [1] * len(shape)
            size[dim] = shape[dim]
            atoms = (
                torch.arange(axis.first, axis.first + axis.size, device="cpu")
                .view(size)
                .expand(shape)
            )
            planes.append(self._replay(atoms))
        self._check_mode()
        return planes[0], planes[1]

    def get_elements(self) -> Tensor:
        """Returns the labels of the elements; zeros for a buffer, whose elements are fixed."""
        if self.stored.state:
            return self._replay(
                torch.zeros(1, dtype=torch.int64, device="cpu").expand(self.stored.shape)
            )
        return self.get_state()

    def get_state(self) -> Tensor:
        """Returns the labels of the elements, of a buffer too."""
        stored = self.stored
        atoms = number_elements(stored.shape)
        if stored.elements is None:
            stored.elements = self.log.add_axis(
                stored.name, None, atoms.numel(), state=stored.state
            )
        self._check_mode()
        return self._replay(atoms + stored.elements.first)

    def pin(self, reason: str) -> None:
        """Makes all that is known of the parameter stay."""
        for axis in (*(self.stored.matrix or ()), self.stored.elements):
            if axis is not None:
                self.log.pin(torch.arange(axis.first, axis.first + axis.size, device="cpu"), reason)

    def _replay(self, labels: Tensor) -> Tensor:
        for change in self.moves:
            labels = change(labels)
        return labels

    def _check_mode(self) -> None:
        """Pins a parameter that is read in both ways, and so has two atoms for one number."""
        if self.stored.matrix is not None and self.stored.elements is not None:
            self.pin(f"{self.stored.name}: {MIXED}")
