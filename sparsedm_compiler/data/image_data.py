"""``ImageData``: what every source of images is, what conditions are, the checks at the door."""

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
from ..errors import DataError
from ..optional_deps import import_optional

Batch = tuple[Tensor, Condition | None]
"""Images float32 [B, C, H, W] and what they are conditioned on."""


class ImageData(Dataset[tuple[Any, ...]], ABC):
    """Images, or latents, that are fetched by number, with what they are conditioned on.

    ``shape``: [C, H, W] of one image. ``classes``: how many classes, None without labels.
    """

    shape: tuple[int, ...]
    classes: int | None

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def fetch(self, numbers: Sequence[int]) -> Batch:
        """Float32 [B, C, H, W] in [-1, 1] (latents: in any range) and their condition.

        Raises DataError for an image that cannot be read, IndexError for a number there is not.
        """

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        """``(image,)`` or ``(image, condition)``: what a DataLoader makes batches of."""
        images, condition = self.fetch([range(len(self))[number]])
        return (images[0],) if condition is None else (images[0], take_rows(condition, 0))

    def index(self, numbers: Sequence[int]) -> Tensor:
        """``numbers`` as int64 [B]. Raises IndexError where one is not in 0 .. len - 1."""
        found = torch.from_numpy(np.array(numbers, dtype=np.int64))
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < len(self):
            raise IndexError(
                f"image {int(found.min())} or {int(found.max())} of {len(self)}: "
                f"numbers run from 0 to {len(self) - 1}"
            )
        return found


def positive(name: str, value: int | None) -> None:
    """Raises DataError where ``value`` is neither None nor positive."""
    if value is not None and value < 1:
        raise DataError(f"{name} {value} is not positive")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a source.

    ``size``: images are cut to their middle square and resized to this side; None leaves them.
    ``labels``: False leaves any condition out. ``limit``: the first so many images, None for all.
    """

    size: int | None = None
    labels: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        positive("size", self.size)
        positive("limit", self.limit)

    def first(self, count: int) -> int:
        """How many of ``count`` images are asked for."""
        return count if self.limit is None else min(count, self.limit)


EVERYTHING = Wanted()

_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def checked_labels(labels: Tensor | np.ndarray, count: int, where: str) -> Tensor:
    """``labels`` as int64 [count]. Raises DataError where they are not a class per image."""
    if isinstance(labels, np.ndarray):
        whole = labels.dtype.kind in "iu"
        found = torch.from_numpy(labels.astype(np.int64)) if whole else torch.empty(0)
    else:
        whole, found = labels.dtype in _INTEGERS, labels
    if not whole:
        raise DataError(
            f"{where}: labels of type {labels.dtype} are not the numbers of classes; "
            "give integers from 0, or leave them out (labels=False)"
        )
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.shape != (count,):
        raise DataError(
            f"{where}: labels {list(found.shape)} for {count} images; give one label per image"
        )
    if count and found.min() < 0:
        raise DataError(
            f"{where}: label {int(found.min())} is below 0: an image without a class? "
            "leave the labels out (labels=False)"
        )
    return found.long()


def checked_condition(condition: Condition, count: int, where: str) -> Condition:
    """``condition`` of ``count`` images. Raises DataError where it is not."""
    if isinstance(condition, Tensor):
        return checked_labels(condition, count, where)
    if not condition:
        raise DataError(f"{where}: an empty mapping is no condition; give None")
    try:
        check_count(condition, count)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return dict(condition)


def count_classes(labels: Tensor | None) -> int | None:
    """One more than the largest label, None without labels."""
    return None if labels is None else int(labels.max()) + 1


def require(module: str, package: str) -> ModuleType:
    """Imports an optional module. Raises ConfigError if its ``package`` is not installed."""
    return import_optional(module, reason=f"these data need {package}", install=package)
