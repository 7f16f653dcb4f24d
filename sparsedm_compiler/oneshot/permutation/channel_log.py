"""What a graph says about channels: which are one, which differ, and which must stay.

A channel of a parameter, one index of one of its dimensions, is an atom: an integer > 0. The value
of every node is described by a tensor of its shape that holds the atom of each element, or 0 where
the element has a fixed place. Such a label tensor is viewed, cut and joined as the value is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Atoms = NDArray[np.int64]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Axis:
    """A dimension of a parameter, or all its elements.

    Attributes:
        parameter: Its name.
        dim: 0 or 1; None for the elements in order.
        first: The atom of index 0.
        size: The number of atoms.
        state: Whether it is a buffer.
    """

    parameter: str
    dim: int | None
    first: int
    size: int
    state: bool = False


@dataclass(slots=True)
class ChannelLog:
    """The atoms of a graph, and everything that was seen of them.

    Attributes:
        axes: All axes, in the order of their atoms.
        signatures: Of every atom a hash of the ops that it takes part in: atoms of equal hashes are
            treated alike by the graph.
        edges: Pairs of atoms that are one channel.
        pins: Atoms that must stay, with the reason as a phrase.
    """

    axes: list[Axis] = field(default_factory=list)
    signatures: Hashes = field(default_factory=lambda: np.zeros(1, np.uint64))
    edges: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    pins: list[tuple[Atoms, str]] = field(default_factory=list)

    def add_axis(self, parameter: str, dim: int | None, size: int, *, state: bool = False) -> Axis:
        """Adds the atoms of an axis."""
        axis = Axis(parameter, dim, len(self.signatures), size, state)
        self.axes.append(axis)
        self.signatures = np.concatenate([self.signatures, np.zeros(size, np.uint64)])
        return axis

    def record(self, labels: Tensor, tag: str, keys: Tensor | None = None) -> None:
        """Notes that atoms take part in an op.

        Args:
            labels: The labels of an operand.
            tag: Names the op and the operand.
            keys: Integers, of a shape that goes with ``labels``: atoms are alike only where their
                keys, in the order of elements, are. None: the op treats all alike.
        """
        if keys is None:
            (flat,) = trim(labels)
            values = np.zeros_like(flat)
        else:
            flat, values = trim(labels, keys=keys)
        used = flat > 0
        flat, hashed = flat[used], mix(values[used].astype(np.uint64))
        if len(flat) > 1:
            order = np.argsort(flat, kind="stable")
            flat, hashed = flat[order], hashed[order]
            fresh = np.concatenate([[True], flat[1:] != flat[:-1]])
            starts = np.flatnonzero(fresh)
            ranks = np.arange(len(flat)) - starts[np.cumsum(fresh) - 1]
            hashed = mix(hashed + ranks.astype(np.uint64))
        np.add.at(self.signatures, flat, mix(hashed + hash_text(tag)))

    def join(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Makes one channel of the atoms at the same elements; those beside a 0 must stay."""
        a, b = trim(first, second)
        both = (a > 0) & (b > 0) & (a != b)
        pairs = np.unique(np.stack([a[both], b[both]]), axis=1)
        self.edges.append((pairs[0], pairs[1]))
        self.pin(torch.from_numpy(a[(a > 0) & (b == 0)]), reason)
        self.pin(torch.from_numpy(b[(b > 0) & (a == 0)]), reason)

    def pin(self, labels: Tensor, reason: str) -> None:
        """Makes all atoms of a label tensor stay."""
        (flat,) = trim(labels)
        atoms = np.unique(flat[flat > 0])
        if len(atoms):
            self.pins.append((atoms, reason))

    def find_read(self) -> NDArray[np.bool_]:
        """Returns of every atom whether an op was seen that takes it."""
        read: NDArray[np.bool_] = self.signatures != 0
        for atoms in (*(part for pair in self.edges for part in pair), *(a for a, _ in self.pins)):
            read[atoms] = True
        return read

    def find_channels(self) -> Atoms:
        """Returns the channel of every atom: the smallest atom of it."""
        root = np.arange(len(self.signatures))
        if not self.edges:
            return root
        a = np.concatenate([pair[0] for pair in self.edges])
        b = np.concatenate([pair[1] for pair in self.edges])
        while True:
            low = np.minimum(root[a], root[b])
            before = root.copy()
            np.minimum.at(root, root[a], low)
            np.minimum.at(root, root[b], low)
            while True:
                shorter = root[root]
                if np.array_equal(shorter, root):
                    break
                root = shorter
            if np.array_equal(root, before):
                return root

    def find_pinned(self, channels: Atoms) -> dict[int, str]:
        """Returns the channels that must stay, each with the first reason."""
        reasons: dict[int, str] = {}
        for atoms, reason in self.pins:
            for channel in np.unique(channels[atoms]):
                reasons.setdefault(int(channel), reason)
        return reasons


def trim(*labels: Tensor, keys: Tensor | None = None) -> list[Atoms]:
    """Returns label tensors flat and of one shape, without dimensions along which none varies.

    Strides alone decide that, so that nothing large is looked at. ``keys`` comes last.
    """
    shape = join_shapes(
        [*(label.shape for label in labels), *([] if keys is None else [keys.shape])]
    )
    wide = [label.expand(shape) for label in labels]
    index = index_varying(wide)
    if keys is not None:
        wide.append(keys.expand(shape))
    return [w[index].reshape(-1).numpy() for w in wide]


def index_varying(labels: Sequence[Tensor]) -> tuple[slice, ...]:
    """Returns an index of label tensors of one shape, which drops dimensions where none varies."""
    return tuple(
        slice(None) if any(w.stride(d) and w.shape[d] > 1 for w in labels) else slice(0, 1)
        for d in range(labels[0].dim())
    )


def join_shapes(shapes: Iterable[Sequence[int]]) -> torch.Size:
    """Returns the shape that tensors of some shapes are broadcast to."""
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def mix(values: Hashes) -> Hashes:
    """Returns well mixed hashes of 64-bit integers (the finalizer of SplitMix64)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hash_text(text: str) -> np.uint64:
    """Returns a hash of a text, the same in every process."""
    whole = np.zeros(1, np.uint64)
    for byte in text.encode():
        whole = mix(whole + np.uint64(byte))
    return np.uint64(whole[0])


def number_elements(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Returns the number of every element of a tensor of that shape, in order."""
    size = 1
    for n in shape:
        size *= n
    return torch.arange(size, device="cpu").view(tuple(shape))


def varies(labels: Tensor, dim: int) -> bool:
    """Returns whether labels differ along a dimension."""
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    return not bool((labels == labels.narrow(dim, 0, 1)).all())


def compact(labels: Tensor) -> Tensor:
    """Returns the same labels with a stride of 0 along dimensions where they do not differ."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) and not varies(labels, dim):
            labels = labels.narrow(dim, 0, 1).expand(labels.shape)
    return labels


def count_distinct(labels: Tensor) -> int:
    """Returns the number of elements of a label tensor that are stored apart."""
    return len(trim(labels)[0])
