"""Training data of any make as one stream of (images, labels) batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from ..errors import DataError
from ..evaluate import generator_at

Batch = tuple[Tensor, Tensor | None]
Data = Tensor | tuple[Tensor, Tensor] | Dataset[Any] | Iterable[Any]
"""Images; (images, labels); a map-style Dataset of either; or an iterable of batches of either."""


def batches(data: Data, size: int, seed: int) -> Iterator[Batch]:
    """An endless stream of batches. Raises DataError for data of another kind.

    Images and map-style datasets are shuffled: image number k of the stream is number k % n of
    the order drawn from (seed, epoch k // n), whatever ``size``, and every batch is full. An
    iterable of batches keeps its own order and sizes and is started over when it ends.
    """
    if (source := indexed(data)) is not None:
        count, fetch = source
        order = shuffled(count, seed)
        while True:
            yield checked(fetch(list(itertools.islice(order, size))))
    for start in itertools.count():
        empty = True
        for batch in iterated(data):
            empty = False
            yield checked(batch)
        if empty:
            raise DataError(
                f"the data ended after {start} rounds: pass a DataLoader or another iterable "
                "that can be started again, not a generator"
            )


def one_pass(data: Data, size: int) -> Iterator[Batch]:
    """The batches of ``data`` once, in order, the last one as small as it comes."""
    if (source := indexed(data)) is not None:
        count, fetch = source
        for first in range(0, count, size):
            yield checked(fetch(list(range(first, min(first + size, count)))))
        return
    for batch in iterated(data):
        yield checked(batch)


def indexed(data: Data) -> tuple[int, Callable[[list[int]], Any]] | None:
    """Length and ``fetch(numbers) -> batch`` of data that can be indexed, None for iterables."""
    if isinstance(data, Tensor):
        images, labels = data, None
    elif isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data):
        images, labels = data if len(data) == 2 else (data[0], None)
        if labels is not None and len(images) != len(labels):
            raise DataError(f"{len(images)} images, but {len(labels)} labels")
    elif isinstance(data, Dataset) and isinstance(data, Sized):
        if isinstance(data, IterableDataset):
            return None
        items: Any = data
        return full(len(data)), lambda numbers: default_collate([items[n] for n in numbers])
    else:
        return None
    fixed = images, labels
    return full(len(images)), lambda numbers: tuple(
        None if part is None else part[torch.tensor(numbers, device=part.device)] for part in fixed
    )


def full(count: int) -> int:
    """``count``, which must not be 0."""
    if count == 0:
        raise DataError("the data hold no images")
    return count


def iterated(data: Data) -> Iterator[Any]:
    """The batches that ``data`` yields by itself. Raises DataError where it yields none."""
    if isinstance(data, tuple | dict | str) or not isinstance(data, Iterable):
        raise DataError(
            f"data of type {type(data).__name__} are neither images, (images, labels), "
            "a Dataset nor an iterable of batches"
        )
    return iter(data)


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Numbers below ``count``, epoch after epoch, each epoch in the order of (seed, epoch)."""
    for epoch in itertools.count():
        yield from torch.randperm(count, generator=generator_at(seed, "order", epoch)).tolist()


def checked(batch: Any) -> Batch:
    """``batch`` as (images, labels or None). Raises DataError where it is not."""
    images, labels = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
    if isinstance(images, list | tuple) and len(images) == 1:
        images = images[0]
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor | None):
        raise DataError(
            f"a batch of type {type(batch).__name__} is neither images nor (images, labels); "
            "wrap the data so that it yields tensors [B, C, H, W], labels [B] beside them"
        )
    if not images.is_floating_point() or images.ndim < 2:
        raise DataError(
            f"images {list(images.shape)} of type {images.dtype} are not floating-point "
            "[B, C, H, W]; scale them to [-1, 1]"
        )
    return images, labels
