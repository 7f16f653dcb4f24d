"""The base of every source of images, the options of reading one, and checks of its values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..diffusion.condition import Condition, check_count, take_rows
from ..diffusion.image_batches import CHUNK, Batch
from ..errors import DataError
from ..optional_deps import import_optional
from .fingerprint import hash_images


class ImageData(Dataset[tuple[Any, ...]], ABC):
    """Base class of images, or latents, that are fetched by number, with their condition.

    A subclass implements ``__len__`` and ``fetch`` and sets the attributes. It satisfies the
    protocol ``sparsedm_compiler.diffusion.ImageSource``.

    Attributes:
        shape: [C, H, W] of one image.
        classes: Number of classes, None without labels.
        notes: What a reader should know of the source, e.g. which files were left out.

    Example:
        >>> class Black(ImageData):
        ...     shape, classes = (1, 2, 2), None
        ...     def __len__(self):
        ...         return 3
        ...     def fetch(self, numbers):
        ...         return torch.full((len(self.check_numbers(numbers)), 1, 2, 2), -1.0), None
        >>> [image.shape for (image,) in Black()]
        [torch.Size([1, 2, 2]), torch.Size([1, 2, 2]), torch.Size([1, 2, 2])]
    """

    shape: tuple[int, ...]
    classes: int | None
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @abstractmethod
    def fetch(self, numbers: Sequence[int]) -> Batch:
        """Returns the images of those numbers, and their condition.

        Args:
            numbers: B image numbers, each in 0 .. len - 1, in any order.

        Returns:
            Float32 [B, C, H, W] in [-1, 1] (latents: in any range), and their condition or None.

        Raises:
            DataError: An image cannot be read.
            IndexError: A number is out of range.
        """

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        """Returns ``(image,)`` or ``(image, condition)``, which a DataLoader can collate."""
        images, condition = self.fetch([range(len(self))[number]])
        return (images[0],) if condition is None else (images[0], take_rows(condition, 0))

    def fingerprint(self) -> str:
        """Returns a hash that other images, labels or sizes change, for resuming a run.

        It covers the number of images and the content of 64 of them, spread evenly over all.

        Returns:
            A SHA-256 in hex, the same at every reading and on every machine.

        Raises:
            DataError: One of the 64 images cannot be read.
        """
        return hash_images(self.fetch, len(self), f"{list(self.shape)} {self.classes}")

    def hash_content(self) -> str | None:
        """Returns a hash that a change of any image alters, beside ``fingerprint``.

        It covers all bytes of images in memory, and of files of latents up to 1 GiB; of folders,
        names and sizes of all files.

        Returns:
            A SHA-256 in hex, the same on every machine; None where it would take long, so that
            ``fingerprint`` alone tells.

        Raises:
            DataError: A file cannot be read.
        """
        return None

    def check_images(self, *, progress: bool = False) -> None:
        """Reads every image.

        Args:
            progress: Whether to show a progress bar where it takes more than two seconds.

        Raises:
            DataError: Images cannot be read; the message names all of them.
        """
        from tqdm.auto import tqdm

        starts = range(0, len(self), CHUNK)
        problems: list[str] = []
        for start in tqdm(starts, desc="reading all images", delay=2, disable=not progress):
            problems += self.find_unreadable(range(start, min(start + CHUNK, len(self))))
        if len(problems) == 1:
            raise DataError(problems[0])
        if problems:
            raise DataError(f"{len(problems):,} images cannot be used: {'; '.join(problems)}")

    def find_unreadable(self, numbers: range) -> list[str]:
        """Returns what is wrong with the images of those numbers.

        Args:
            numbers: Image numbers, each in 0 .. len - 1.

        Returns:
            A sentence for each that cannot be read, which names it; empty where all can.
        """
        try:
            self.fetch(numbers)
        except DataError as error:
            return [str(error)]
        return []

    def check_numbers(self, numbers: Sequence[int]) -> Tensor:
        """Returns ``numbers`` as int64 [B].

        Raises IndexError where one is not in 0 .. len - 1.
        """
        index = torch.from_numpy(np.array(numbers, dtype=np.int64))
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(
                f"image {int(index.min())} or {int(index.max())} of {len(self)}: "
                f"numbers run from 0 to {len(self) - 1}"
            )
        return index


def check_positive(name: str, value: int | None) -> None:
    """Raises DataError where ``value`` is neither None nor positive."""
    if value is not None and value < 1:
        raise DataError(f"{name} {value} is not positive")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The way to read a source of images: size, labels and number of images.

    Attributes:
        size: Side in pixels to which the middle square of every image is resized; None leaves the
            images as they are.
        labels: False leaves labels and any other condition out.
        limit: Number of images to keep, the first ones; None keeps all.

    Raises:
        DataError: ``size`` or ``limit`` is not positive.

    Example:
        >>> ReadOptions(limit=100).limit_count(360)
        100
    """

    size: int | None = None
    labels: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        check_positive("size", self.size)
        check_positive("limit", self.limit)

    def limit_count(self, count: int) -> int:
        """Returns the number of images to keep of ``count``."""
        return count if self.limit is None else min(count, self.limit)


READ_ALL = ReadOptions()

_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def check_labels(labels: Tensor | np.ndarray, count: int, source: str) -> Tensor:
    """Checks that ``labels`` are one class per image, and returns them as int64 [count].

    ``source`` names the data in errors. Raises DataError where they are not a class per image.
    """
    if isinstance(labels, np.ndarray):
        whole = labels.dtype.kind in "iu"
        classes = (
            torch.from_numpy(labels.astype(np.int64)) if whole else torch.empty(0, device="cpu")
        )
    else:
        whole, classes = labels.dtype in _INTEGERS, labels
    if not whole:
        raise DataError(
            f"{source}: labels of type {labels.dtype} are not the numbers of classes; "
            "give integers from 0, or leave them out (labels=False)"
        )
    if classes.ndim == 2 and classes.shape[1] == 1:
        classes = classes[:, 0]
    if classes.shape != (count,):
        raise DataError(
            f"{source}: labels {list(classes.shape)} for {count} images; give one label per image"
        )
    if count and classes.min() < 0:
        raise DataError(
            f"{source}: label {int(classes.min())} is below 0: an image without a class? "
            "leave the labels out (labels=False)"
        )
    return classes.long()


def check_condition(condition: Condition, count: int, source: str) -> Condition:
    """Checks that ``condition`` has a row for each of ``count`` images, and returns it.

    Labels become int64 [count]. ``source`` names the data in errors. Raises DataError where a
    tensor has another number of rows.
    """
    if isinstance(condition, Tensor):
        return check_labels(condition, count, source)
    if not condition:
        raise DataError(f"{source}: an empty mapping is no condition; give None")
    try:
        check_count(condition, count)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    return dict(condition)


def count_classes(labels: Tensor | None) -> int | None:
    """Returns one more than the largest label, None without labels."""
    return None if labels is None else int(labels.max()) + 1


def require(module: str, package: str) -> ModuleType:
    """Imports an optional module. Raises ConfigError if its ``package`` is not installed."""
    return import_optional(module, reason=f"these data need {package}", install=package)
