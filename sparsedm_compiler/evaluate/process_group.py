"""Communication of processes that score together: shares of the work, sums, small objects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..diffusion.image_batches import ProcessShare
from ..errors import ConfigError, SparseDMError
from .moments import Moments

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(days=1)
"""How long a process waits for others: a chunk of images may take hours, and one has none left."""


def in_process_group() -> bool:
    """Returns whether torch.distributed has been initialised (accelerate does so) here."""
    return dist.is_available() and dist.is_initialized()


def join_process_group() -> PartialState:
    """Joins the processes that a launcher started, and returns Accelerate's state of this one.

    Without a GPU, Accelerate would take every one of them for the only one unless it is told.
    """
    from accelerate import PartialState

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone:
        return PartialState()
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def own_share() -> ProcessShare:
    """Returns (rank, processes) of this process; (0, 1) where it runs alone.

    Raises ConfigError where a launcher started several processes and no process group exists.
    """
    if in_process_group():
        return dist.get_rank(), dist.get_world_size()
    if (started := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"WORLD_SIZE says {started} processes, but there is no process group: call "
            "accelerate.PartialState() or torch.distributed.init_process_group() first"
        )
    return 0, 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Returns the sum of ``values`` over all processes, on the CPU."""
    if not in_process_group():
        return values
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    moved = values.detach().clone().to(device)
    dist.all_reduce(moved)
    return moved.cpu()


def gather_objects(value: Any) -> list[Any]:
    """Returns the picklable ``value`` of every process by rank, on every process."""
    if not in_process_group():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def raising_together() -> Iterator[None]:
    """Runs a block in every process; an error of this package in one is raised in all of them.

    So no process waits for one that has ended.
    """
    own: SparseDMError | None = None
    try:
        yield
    except SparseDMError as error:
        own = error
    first = next((other for other in gather_objects(own) if other is not None), None)
    if first is not None:
        raise own or first


def merge_moments(own: Moments | None) -> Moments | None:
    """Returns the moments of the features of all processes; None where no process has any.

    mean = sum n_i mean_i / n, scatter = sum scatter_i + n_i D_i D_i^T with D_i = mean_i - mean.
    """
    own_width = None if own is None else len(own.mean)
    widths = [width for width in gather_objects(own_width) if width]
    if not widths or not in_process_group():
        return own
    part = own or Moments.empty(widths[0])
    count = int(sum_over_processes(torch.tensor(part.count, device="cpu")).item())
    mean = sum_over_processes(part.count * part.mean) / count
    shift = part.mean - mean
    scatter = part.scatter + part.count * torch.outer(shift, shift)
    return Moments(count, mean, sum_over_processes(scatter))
