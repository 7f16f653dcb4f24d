"""``TensorData``: images that are tensors already, and arrays that become such."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..diffusion.condition import Condition, take_rows
from ..errors import DataError
from .image_data import Batch, ImageData, Wanted, checked_condition, checked_labels, count_classes
from .pixels import pixels_of, resized, scaled


class TensorData(ImageData):
    """Images [n, C, H, W] in memory: uint8 of 0..255, or floats that are given out as they are.

    ``condition``: labels [n] or named tensors, each [n, ...]. Raises DataError where they do not
    fit or a float is NaN or Inf. Floats may have any range, since latents do.

    >>> data = TensorData(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    >>> data.fetch([1, 0])[0].flatten()
    tensor([ 1., -1.])
    """

    def __init__(
        self,
        images: Tensor,
        condition: Condition | None = None,
        *,
        classes: int | None = None,
        where: str = "the tensor",
    ) -> None:
        if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
            raise DataError(
                f"{where}: images {list(images.shape)} of type {images.dtype} are not "
                "[n, C, H, W], uint8 or floating-point"
            )
        if not images.numel():
            raise DataError(f"{where} holds no images")
        if images.is_floating_point() and not images.isfinite().all():
            raise DataError(f"{where}: the images hold NaN or Inf")
        self.images = images
        self.condition = (
            None if condition is None else checked_condition(condition, len(images), where)
        )
        self.shape = tuple(images.shape[1:])
        labels = self.condition if isinstance(self.condition, Tensor) else None
        self.classes = count_classes(labels) if classes is None else classes

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, numbers: Sequence[int]) -> Batch:
        index = self.index(numbers)
        images = scaled(self.images[index])
        return images, None if self.condition is None else take_rows(self.condition, index)


def from_arrays(
    images: np.ndarray, labels: np.ndarray | None, wanted: Wanted, where: str
) -> TensorData:
    """What is ``wanted`` of images as ``pixels_of`` takes them, and of their labels [n]."""
    pixels = pixels_of(images, where)
    found = None
    if labels is not None and wanted.labels:
        found = checked_labels(labels, len(pixels), where)
    count = wanted.first(len(pixels))
    return TensorData(
        resized(pixels[:count], wanted.size),
        None if found is None else found[:count],
        classes=count_classes(found),
        where=where,
    )
