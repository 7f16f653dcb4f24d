"""``FoldedWeight``: one weight as it was folded, and whether it is still that."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from .edit_watch import WeightSample, sample_values


@dataclass(slots=True)
class FoldedWeight:
    """A weight as it was folded.

    ``state``: its version counter and storage. ``before``: some of its values, for edits that move
    neither; None for one that was finalized.
    """

    weight: weakref.ref[Tensor]
    state: tuple[int, int]
    before: Tensor | None
    folded: Tensor

    @property
    def is_in_place(self) -> bool:
        """Whether the weight lies where it was folded."""
        weight = self.weight()
        return weight is not None and weight.data_ptr() == self.state[1]

    @property
    def is_watched(self) -> bool:
        """Whether its device is to be asked for edits."""
        return self.before is not None and is_asynchronous(self.before) and self.is_in_place

    def sample(self) -> WeightSample | None:
        """Returns values of the weight, as they are and were; None where it is gone or has none.

        No view of it is kept, which would hold its memory where it is moved to another device.
        """
        weight = self.weight()
        if weight is None or self.before is None or not self.is_in_place:
            return None
        now = sample_values(weight.detach(), spread=is_asynchronous(weight))
        return WeightSample(now, self.before)


def is_asynchronous(weight: Tensor) -> bool:
    """Whether reading the weight would force a device synchronization (any device but the CPU)."""
    return weight.device.type != "cpu"
