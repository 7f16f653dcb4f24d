"""Images by number in fixed chunks, so that any number of processes makes the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .condition import Condition

CHUNK = 256
"""Default number of images in a chunk."""
ProcessShare: TypeAlias = tuple[int, int]
"""(rank, processes): the share of the work that one process does; (0, 1) is all of it."""
NumberedBatches: TypeAlias = Iterator[tuple[range, Tensor]]
"""Image numbers, and these images [B, C, H, W] in [-1, 1]."""
Batch: TypeAlias = "tuple[Tensor, Condition | None]"
"""Images float32 [B, C, H, W], and their condition."""


@runtime_checkable
class ImageSource(Protocol):
    """Any data with a length that returns many images at once, by number.

    ``sparsedm_compiler.data.ImageData`` and every class derived from it satisfy this protocol.
    """

    def __len__(self) -> int:
        """Returns the number of images."""

    def fetch(self, numbers: Sequence[int]) -> Batch:
        """Returns images [B, C, H, W] in [-1, 1] and their condition.

        Args:
            numbers: B image numbers, each in 0 .. len - 1, in any order.

        Returns:
            The images in the order of ``numbers``, and their condition or None.
        """


def iterate_chunks(count: int, size: int, share: ProcessShare = (0, 1)) -> Iterator[range]:
    """Yields the chunks [k * size, (k + 1) * size) of the numbers below ``count``, for one share.

    The chunks do not depend on the share: process ``rank`` takes every ``processes``-th chunk,
    from chunk ``rank`` on. Raises ConfigError for a size below 1, or a share that does not exist.

    >>> [*iterate_chunks(10, 4)], [*iterate_chunks(10, 4, share=(1, 2))]
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
    source: ImageSource | Tensor, *, batch_size: int = CHUNK, share: ProcessShare = (0, 1)
) -> NumberedBatches:
    """Yields the images of a source in order, chunk by chunk, with their numbers.

    Args:
        source: Images [n, C, H, W] in [-1, 1], or data such as ``open_data`` returns.
        batch_size: Images in a chunk; the last chunk may be smaller.
        share: (rank, processes) of this process, which gets every ``processes``-th chunk. The
            default is all chunks.

    Yields:
        Image numbers, and these images [B, C, H, W].

    Raises:
        ConfigError: ``batch_size`` is below 1, or the share does not exist.
        DataError: A batch is not floating-point [B, C, H, W], or holds NaN or Inf.

    Example:
        >>> [(n, len(x)) for n, x in image_batches(torch.zeros(5, 1, 2, 2), batch_size=3)]
        [(range(0, 3), 3), (range(3, 5), 2)]
    """
    for numbers in iterate_chunks(len(source), batch_size, share):
        if isinstance(source, Tensor):
            images = source[numbers.start : numbers.stop]
        else:
            images = source.fetch(numbers)[0]
        yield numbers, check_images(images, numbers)


def check_images(images: Tensor, numbers: Sequence[int]) -> Tensor:
    """Checks that ``images`` are floating-point, finite and as many as ``numbers``.

    Returns them unchanged. Raises DataError unless they are [len(numbers), C, H, W] without NaN or
    Inf.
    """
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


def round_to_uint8(images: Tensor) -> Tensor:
    """Rounds ``images`` in [-1, 1] as a PNG stores them: clamped, and in steps of 1 / 127.5.

    >>> round_to_uint8(torch.tensor([-3.0, 0.0, 1.0]))
    tensor([-1.0000,  0.0039,  1.0000])
    """
    return to_uint8(images).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Converts ``images`` in [-1, 1] to uint8 0..255 on the CPU, clamped and rounded."""
    return ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
