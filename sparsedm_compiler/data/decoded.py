"""``DecodedData``: pictures that Pillow decodes when they are fetched."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.condition import Condition
from ..errors import DataError
from .image_data import Batch, ImageData, Wanted, count_classes
from .pixels import decoded, in_threads, scaled

Encoded = tuple[str, Path | BytesIO]
"""What errors call a picture, and what Pillow opens."""


class DecodedData(ImageData):
    """Pictures as RGB [3, H, W], whatever their mode; all of one size where none is given.

    ``count``: all there are; ``labels`` int64 [count] or None. A subclass sets what its
    ``encoded`` needs first: the first picture is decoded here, for the shape.
    """

    def __init__(self, count: int, labels: Tensor | None, wanted: Wanted) -> None:
        self.count = wanted.first(count)
        self.size = wanted.size
        self.labels = None if labels is None else labels[: self.count]
        self.classes = count_classes(labels)
        ((self.first, file),) = self.encoded([0])
        height, width, channels = decoded(self.first, file, self.size).shape
        self.shape = (channels, height, width)

    @abstractmethod
    def encoded(self, numbers: Sequence[int]) -> Sequence[Encoded]:
        """The pictures ``numbers``, each with its name."""

    def condition(self, index: Tensor) -> Condition | None:
        """What the images at ``index`` [B] are conditioned on."""
        return None if self.labels is None else self.labels[index]

    def pixels(self, index: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of the pictures at ``index`` [B]."""
        found = torch.empty(len(index), *self.shape, dtype=torch.uint8)
        pictures = in_threads(self._decoded, self.encoded(index.tolist()) if len(index) else [])
        for row, picture in zip(found, pictures, strict=True):
            row.copy_(picture)
        return found

    def _decoded(self, item: Encoded) -> Tensor:
        picture = torch.from_numpy(decoded(*item, self.size)).permute(2, 0, 1)
        if picture.shape != self.shape:
            raise DataError(
                f"{item[0]} is {picture.shape[2]} x {picture.shape[1]} pixels, {self.first} "
                f"{self.shape[2]} x {self.shape[1]}: give a size that all are brought to"
            )
        return picture

    def __len__(self) -> int:
        return self.count

    def fetch(self, numbers: Sequence[int]) -> Batch:
        index = self.index(numbers)
        return scaled(self.pixels(index)), self.condition(index)


class FileData(DecodedData):
    """Image files, with a label each or none."""

    def __init__(self, paths: Sequence[Path], labels: Tensor | None, wanted: Wanted) -> None:
        self.paths = paths
        super().__init__(len(paths), labels, wanted)

    def encoded(self, numbers: Sequence[int]) -> Sequence[Encoded]:
        return [(str(self.paths[number]), self.paths[number]) for number in numbers]
