"""Images by number in fixed chunks, so that any number of processes makes the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, DataError

CHUNK = 256
"""Images in a chunk, unless one says otherwise."""
Share = tuple[int, int]
"""(rank, processes): whose part of the work; (0, 1) is all of it."""
Batches = Iterator[tuple[range, Tensor]]
"""The numbers of some images, and the images [B, C, H, W] in [-1, 1]."""


class ImageSource(Protocol):
    """What is asked of data (``ImageData``): a length, and images by number."""

    def __len__(self) -> int:
        """How many images there are."""

    def fetch(self, numbers: Sequence[int]) -> tuple[Tensor, Any]:
        """Images [B, C, H, W] in [-1, 1], and whatever goes with them."""


def chunks(count: int, size: int, share: Share = (0, 1)) -> Iterator[range]:
    """The numbers below ``count`` in chunks [k * size, (k + 1) * size), those of ``share``.

    The chunks do not depend on the share, whose are every ``processes``-th from ``rank`` on.

    >>> [*chunks(10, 4)], [*chunks(10, 4, share=(1, 2))]
    ([range(0, 4), range(4, 8), range(8, 10)], [range(4, 8)])
    """
    rank, processes = share
    if size < 1 or count < 0:
        raise ConfigError(f"{count} images in batches of {size}: a batch holds at least 1 image")
    if not 0 <= rank < processes:
        raise ConfigError(f"share {rank} of {processes} does not exist: ranks count from 0")
    for first in range(rank * size, count, processes * size):
        yield range(first, min(first + size, count))


def image_batches(
    source: ImageSource | Tensor, *, batch_size: int = CHUNK, share: Share = (0, 1)
) -> Batches:
    """The images of ``source``, [n, C, H, W] or data, with their numbers, those of ``share``."""
    for numbers in chunks(len(source), batch_size, share):
        if isinstance(source, Tensor):
            images = source[numbers.start : numbers.stop]
        else:
            images = source.fetch(numbers)[0]
        yield numbers, checked(images, numbers)


def checked(images: Tensor, numbers: Sequence[int]) -> Tensor:
    """``images`` if they are as many finite images as ``numbers``. Raises DataError."""
    if images.ndim != 4 or len(images) != len(numbers) or not images.is_floating_point():
        raise DataError(
            f"images {list(images.shape)} of type {images.dtype} for {len(numbers)} numbers are "
            f"not floating-point [{len(numbers)}, C, H, W] in [-1, 1]"
        )
    if not images.isfinite().all():
        raise DataError(
            f"images {numbers[0]} to {numbers[-1]} hold NaN or Inf: the model or its sampler "
            "diverged, or the data are broken"
        )
    return images


def rounded(images: Tensor) -> Tensor:
    """``images`` in [-1, 1] as a PNG keeps them: clamped, and in steps of 1 / 127.5.

    >>> rounded(torch.tensor([-3.0, 0.0, 1.0]))
    tensor([-1.0000,  0.0039,  1.0000])
    """
    return pixels(images).float() / 127.5 - 1


def pixels(images: Tensor) -> Tensor:
    """``images`` in [-1, 1] as bytes 0..255 on the CPU: what every picture is written from."""
    return ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
