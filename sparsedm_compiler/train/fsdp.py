"""Parameters that lie in rows on several processes (FSDP2), and masks of the rows that lie here.

Groups of m run along the input channels, inside a row, so a process masks its own rows alone.
Only masks decided for several rows together (n:mxR, V:n:m, n:4t) need the rows of other processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .. import ConfigError, Pattern
from ..masks.mask_ste import zero_kept
from ..masks.nm_mask import apply_inverse_mask, compute_mask


def shard(student: nn.Module, processes: int) -> None:
    """Keep a share of every parameter on each process; a call gathers them, then lets go again.

    The whole student is one unit. Its class becomes torch's FSDP sub-class of its own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if processes == 1:
        raise ConfigError("shard=True needs several processes: accelerate launch --num_processes N")
    if any(isinstance(module, FSDPModule) for module in student.modules()):
        raise ConfigError(f"parts of {type(student).__name__} are sharded already: give it whole")
    device = next(student.parameters()).device.type
    fully_shard(student, mesh=init_device_mesh(device, (processes,)), reshard_after_forward=True)


def here(tensor: Tensor) -> Tensor:
    """The rows of ``tensor`` on this process: all of them where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of ``tensor``; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(full: Tensor, like: Tensor) -> Tensor:
    """Those rows of ``full`` that ``like`` has here."""
    if not isinstance(like, DTensor):
        return full
    placement = like.placements[0]
    if not isinstance(placement, Shard):
        return full
    parts = torch.chunk(full, like.device_mesh.size(), dim=placement.dim)
    rank = like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else full.narrow(placement.dim, 0, 0)


@torch.no_grad()
def put(target: Tensor, full: Tensor) -> None:
    """Make ``full`` the values of ``target``."""
    here(target).copy_(rows_of(full, target))


def sharded_like(full: Tensor, like: Tensor) -> Tensor:
    """``full`` laid out as ``like``, if it is of its shape."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    local = rows_of(full, like).to(like.device).contiguous()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def state_like(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state_dict of whole tensors, laid out as the parameters of ``optimizer``."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    found = {
        number: {
            name: sharded_like(value, weights[number]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": found}


def mask_here(weight: Tensor, pattern: Pattern) -> Tensor:
    """The mask of ``weight``, of the rows on this process.

    Where masks are decided for several rows together, all processes must ask at the same time.
    """
    if isinstance(weight, DTensor) and pattern.height > 1:
        return rows_of(compute_mask(whole(weight.detach()), pattern), weight)
    return compute_mask(here(weight.detach()), pattern)


def pruned_here(weight: Tensor, pattern: Pattern) -> Tensor:
    """``(1 - mask) * weight`` of the rows on this process; else as ``mask_here``."""
    if isinstance(weight, DTensor) and pattern.height > 1:
        return apply_inverse_mask(here(weight), mask_here(weight, pattern))
    return zero_kept(here(weight), pattern)


def whole_state(model: nn.Module) -> Mapping[str, Tensor]:
    """The state_dict of ``model`` with all rows of everything; every process must ask."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}
