"""What several processes tell each other to score together: shares, sums, small things."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..diffusion.image_batches import ProcessShare
from ..errors import ConfigError
from .moments import Moments


def running() -> bool:
    """Whether this process is one of a group (torch.distributed; accelerate initialises it)."""
    return dist.is_available() and dist.is_initialized()


def own_share() -> ProcessShare:
    """(rank, processes) of this process; (0, 1) where it is alone.

    Raises ConfigError where a launcher started several and nothing has brought them together.
    """
    if running():
        return dist.get_rank(), dist.get_world_size()
    if (started := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"WORLD_SIZE says {started} processes, but there is no process group: call "
            "accelerate.PartialState() or torch.distributed.init_process_group() first"
        )
    return 0, 1


def total(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, on the CPU."""
    if not running():
        return values
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    moved = values.detach().clone().to(device)
    dist.all_reduce(moved)
    return moved.cpu()


def gathered(value: Any) -> list[Any]:
    """The small things that all processes gave, by rank, on every process."""
    if not running():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def total_moments(own: Moments | None) -> Moments | None:
    """The moments of the features of all processes; None where no process has any.

    mean = sum n_i mean_i / n, scatter = sum scatter_i + n_i D_i D_i^T with D_i = mean_i - mean.
    """
    widths = [width for width in gathered(None if own is None else len(own.mean)) if width]
    if not widths or not running():
        return own
    part = own or Moments.none(widths[0])
    count = int(total(torch.tensor(part.count)).item())
    mean = total(part.count * part.mean) / count
    away = part.mean - mean
    return Moments(count, mean, total(part.scatter + part.count * torch.outer(away, away)))
