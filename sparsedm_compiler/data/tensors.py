"""Images that are tensors in memory, and arrays that become such."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..diffusion.condition import Condition, list_tensors, take_rows
from ..diffusion.image_batches import Batch
from ..errors import DataError
from .fingerprint import hash_all
from .image_data import ImageData, ReadOptions, check_condition, check_labels, count_classes
from .pixels import pixels_from_array, resize_pixels, scale_pixels


class TensorData(ImageData):
    """Images in memory, with labels or named conditions.

    Args:
        images: [n, C, H, W], uint8 of 0..255, or floating-point, which is returned as it is. Floats
            may have any range, since latents do.
        condition: Labels [n] or named tensors, each [n, ...]; None for none.
        classes: Number of classes; None is one more than the largest label.
        where: Name of the data in error messages.

    Raises:
        DataError: Shapes or types do not fit, or a float is NaN or Inf.

    Example:
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
            None if condition is None else check_condition(condition, len(images), where)
        )
        self.shape = tuple(images.shape[1:])
        labels = self.condition if isinstance(self.condition, Tensor) else None
        self.classes = count_classes(labels) if classes is None else classes

    def __len__(self) -> int:
        return len(self.images)

    def hash_content(self) -> str:
        condition = {} if self.condition is None else list_tensors(self.condition)
        return hash_all([self.images, *condition.values()])

    def fetch(self, numbers: Sequence[int]) -> Batch:
        index = self.check_numbers(numbers)
        images = scale_pixels(self.images[index])
        return images, None if self.condition is None else take_rows(self.condition, index)


def from_arrays(
    images: np.ndarray, labels: np.ndarray | None, options: ReadOptions, source: str
) -> TensorData:
    """Builds data from images as ``pixels_from_array`` takes them, and their labels [n].

    ``source`` names the data in errors. Raises DataError where they do not fit.
    """
    pixels = pixels_from_array(images, source)
    classes = None
    if labels is not None and options.labels:
        classes = check_labels(labels, len(pixels), source)
    count = options.limit_count(len(pixels))
    return TensorData(
        resize_pixels(pixels[:count], options.size),
        None if classes is None else classes[:count],
        classes=count_classes(classes),
        where=source,
    )
