"""The feature network that scores look through, and the callables that can serve as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Extractor(Protocol):
    """Any callable from images to features; every ``nn.Module`` with such a forward is one."""

    def __call__(self, images: Tensor, /) -> Any:
        """Returns features [B, d], [B, d, 1, 1] or a tuple that starts with them.

        ``images`` are [B, C, H, W] in [-1, 1].
        """


@dataclass(frozen=True, slots=True)
class FeatureNetwork:
    """A feature network together with the name that results print for it.

    Attributes:
        name: The name in results, as in "FD-DigitsCNN".
        network: A module or function from images [B, C, H, W] in [-1, 1] to features [B, d],
            [B, d, 1, 1], or a tuple or list that starts with such a tensor.
    """

    name: str
    network: Extractor
