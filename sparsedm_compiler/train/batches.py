"""Training data of any form as one stream of (images, condition) batches, indexed by position."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..diffusion import generator_at
from ..diffusion.condition import Condition, check_count, take_rows
from ..diffusion.image_batches import Batch, ImageSource
from ..errors import DataError

Data = Tensor | tuple[Tensor, Tensor] | Dataset[Any] | Iterable[Any]
"""Images; (images, labels); a map-style Dataset of either; or an iterable of batches of either."""

Fetch = Callable[[list[int]], Any]


@dataclass(frozen=True, slots=True)
class BatchShare:
    """One process's share of every batch: ``parts`` of its ``world * parts`` equal parts.

    ``parts``: how many micro-batches the process takes its share in (gradient accumulation).
    """

    rank: int = 0
    world: int = 1
    parts: int = 1

    def split(self, total: int) -> list[range]:
        """Returns the rows of a batch of ``total`` that this process trains on, per micro-batch.

        Raises DataError where there are fewer images than parts.
        """
        count = self.world * self.parts
        if total < count:
            raise DataError(
                f"a batch of {total} images cannot be shared by {self.world} processes in "
                f"{self.parts} parts each"
            )
        edges = [total * k // count for k in range(count + 1)]
        mine = range(self.rank * self.parts, (self.rank + 1) * self.parts)
        return [range(edges[k], edges[k + 1]) for k in mine]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Part of a batch of ``total`` images: those from position ``first`` of the stream."""

    images: Tensor
    condition: Condition | None
    first: int
    total: int


@dataclass(frozen=True, slots=True)
class Stream:
    """The images of a run in their order, which ``start_at(seen)`` can enter anywhere.

    Images and map-style datasets are shuffled: image number k of the stream is number k % n of
    the order drawn from (seed, epoch k // n), whatever ``size``, and every batch is full. An
    iterable of batches keeps its own order and sizes and is started over when it ends; to begin
    in its middle, what came before is read and dropped.
    """

    data: Data
    size: int
    seed: int
    share: BatchShare = BatchShare()
    workers: int = 0

    def start_at(self, seen: int = 0) -> Iterator[list[MicroBatch]]:
        """Yields this process's micro-batches, batch after batch, after ``seen`` images.

        Raises DataError for data of the wrong form, and for iterables that cannot start over.
        """
        if (source := index_data(self.data)) is not None:
            return self._start_indexed(*source, seen)
        return self._start_iterable(seen)

    def _start_indexed(self, count: int, fetch: Fetch, seen: int) -> Iterator[list[MicroBatch]]:
        parts = self.share.split(self.size)
        order = ShuffledOrder(count, self.seed)
        numbers = (
            order.take(first + part.start, len(part))
            for first in itertools.count(seen, self.size)
            for part in parts
        )
        fetched: Iterable[Any] = map(fetch, numbers)
        if self.workers and not lie_on_cards(self.data):
            fetched = DataLoader(
                _ByNumbers(fetch), batch_size=None, sampler=numbers, num_workers=self.workers
            )
        batches = iter(fetched)
        for first in itertools.count(seen, self.size):
            yield [
                MicroBatch(*check_batch(next(batches)), first + part.start, self.size)
                for part in parts
            ]

    def _start_iterable(self, seen: int) -> Iterator[list[MicroBatch]]:
        first = 0
        for start in itertools.count():
            empty = True
            for batch in iterate_batches(self.data):
                empty = False
                images, condition = check_batch(batch)
                if first >= seen:
                    yield [
                        MicroBatch(
                            images[part.start : part.stop],
                            None if condition is None else take_rows(condition, part),
                            first + part.start,
                            len(images),
                        )
                        for part in self.share.split(len(images))
                    ]
                first += len(images)
            if empty:
                raise DataError(
                    f"the data ended after {start} rounds: pass a DataLoader or another iterable "
                    "that can be started again, not a generator"
                )


class _ByNumbers(Dataset[Any]):
    """The dataset of a worker process: an "index" is the numbers of a whole batch."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch

    def __getitem__(self, numbers: list[int]) -> Any:
        return self.fetch(numbers)


class ShuffledOrder:
    """Numbers below ``count``, epoch after epoch, each epoch in the order of (seed, epoch)."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._numbers = -1, torch.empty(0, device="cpu")

    def take(self, first: int, size: int) -> list[int]:
        """Returns the numbers at positions ``first`` to ``first + size - 1`` of the stream."""
        numbers: list[int] = []
        while len(numbers) < size:
            epoch, within = divmod(first + len(numbers), self.count)
            if epoch != self._epoch:
                source = generator_at(self.seed, "order", epoch)
                self._epoch, self._numbers = (
                    epoch,
                    torch.randperm(self.count, generator=source, device="cpu"),
                )
            numbers += self._numbers[within : within + size - len(numbers)].tolist()
        return numbers


def iterate_once(data: Data, size: int) -> Iterator[Batch]:
    """Yields the batches of ``data`` once, in order; the last one may be smaller than ``size``."""
    if (source := index_data(data)) is not None:
        count, fetch = source
        for first in range(0, count, size):
            yield check_batch(fetch(list(range(first, min(first + size, count)))))
        return
    for batch in iterate_batches(data):
        yield check_batch(batch)


def index_data(data: Data) -> tuple[int, Fetch] | None:
    """Returns length and ``fetch(numbers) -> batch`` of indexable data, None for iterables.

    Raises DataError for data that hold no images, and for labels of another count.
    """
    if isinstance(data, ImageSource):
        return check_not_empty(len(data)), data.fetch
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
        return check_not_empty(len(data)), lambda numbers: default_collate(
            [items[n] for n in numbers]
        )
    else:
        return None
    fixed = images, labels
    return check_not_empty(len(images)), lambda numbers: tuple(
        None if part is None else part[torch.tensor(numbers, device=part.device)] for part in fixed
    )


def lie_on_cards(data: Data) -> bool:
    """Returns whether images or labels lie on a card, where a forked worker cannot read them."""
    parts = data if isinstance(data, tuple | list) else getattr(data, "tensors", (data,))
    return any(isinstance(part, Tensor) and part.is_cuda for part in parts)


def check_not_empty(count: int) -> int:
    """Returns ``count``. Raises DataError if it is 0."""
    if count == 0:
        raise DataError("the data hold no images")
    return count


def iterate_batches(data: Data) -> Iterator[Any]:
    """Yields the batches that ``data`` itself yields. Raises DataError if it is no iterable."""
    if isinstance(data, tuple | dict | str) or not isinstance(data, Iterable):
        raise DataError(
            f"data of type {type(data).__name__} are neither images, (images, labels), "
            "a Dataset nor an iterable of batches"
        )
    return iter(data)


def check_batch(batch: Any) -> Batch:
    """Returns ``batch`` as (images, condition or None). Raises DataError if it is no batch."""
    images, condition = (
        batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
    )
    if isinstance(images, list | tuple) and len(images) == 1:
        images = images[0]
    if not isinstance(images, Tensor) or not isinstance(condition, Tensor | Mapping | None):
        raise DataError(
            f"a batch of type {type(batch).__name__} is neither images nor (images, labels); "
            "wrap the data so that it yields tensors [B, C, H, W], and beside them labels [B] or "
            "a dict of what the model's forward takes"
        )
    if not images.is_floating_point() or images.ndim < 2:
        raise DataError(
            f"images {list(images.shape)} of type {images.dtype} are not floating-point "
            "[B, C, H, W]; scale them to [-1, 1]"
        )
    if condition is not None:
        check_count(condition, len(images))
    return images, condition
