"""Parameters whose rows are spread over several processes (FSDP2), and masks of the local rows.

Groups of m run along the input channels, inside a row, so a process masks its own rows alone.
Only masks decided for several rows together (n:mxR, n:m@RxC, V:n:m, n:4t) need the rows of other
processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .. import ConfigError, Pattern, zero_kept
from .find_blocks import find_blocks
from .gradient_checkpointing import checkpoints_by_itself, is_wrapped


def shard_parameters(
    student: nn.Module, processes: int, call: Callable[[], None] | None = None
) -> None:
    """Keeps a share of every parameter per process; each call gathers them and frees them again.

    Every repeated block is a unit, gathered for its own forward and backward, and all that lies
    outside of blocks, or is tied to what does, is one more. Blocks run as graphs of their own then,
    since TorchDynamo leaves the hooks that gather to Python. A student that checkpoints by means of
    its own, which would run such a block again without its masks, is one unit. Classes become
    torch's FSDP sub-classes of their own. Raises ConfigError for one process, and for a student
    that is sharded already. ``call``: see ``list_units``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if processes == 1:
        raise ConfigError("shard=True needs several processes: accelerate launch --num_processes N")
    if any(isinstance(module, FSDPModule) for module in student.modules()):
        raise ConfigError(f"parts of {type(student).__name__} are sharded already: give it whole")
    device = next(student.parameters()).device.type
    mesh = init_device_mesh(device, (processes,))
    for unit in (*list_units(student, call), student):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def list_units(student: nn.Module, call: Callable[[], None] | None = None) -> list[nn.Module]:
    """Returns the blocks that are gathered one by one: none if a student checkpoints by itself.

    A parameter belongs to one unit, so blocks that share one with anything else are left out.
    ``call``: calls the student, to see blocks whose parts are called from outside, when they are
    not gathered; these are left out too. None takes it that there are none.
    """
    if checkpoints_by_itself(student):
        return []
    wrapped = [*filter(is_wrapped, student.modules())]
    blocks = dict.fromkeys(wrapped or find_blocks(student))
    owned = [parameter for block in blocks for parameter in block.parameters()]
    owners = Counter([*owned, *list_outside_parameters(student, blocks)])
    alone = [block for block in blocks if all(owners[own] == 1 for own in block.parameters())]
    entered = set() if call is None else find_entered_blocks(alone, call)
    return [block for block in alone if block not in entered]


def find_entered_blocks(blocks: Iterable[nn.Module], call: Callable[[], None]) -> set[nn.Module]:
    """Returns the blocks of which ``call`` calls a part outside of the block's own call.

    diffusers' DiT does: its output layer embeds the time by the first block.
    """
    running: set[nn.Module] = set()
    entered: set[nn.Module] = set()

    def enter(block: nn.Module, *_: Any) -> None:
        running.add(block)

    def leave(block: nn.Module, *_: Any) -> None:
        running.discard(block)

    def look(block: nn.Module, *_: Any) -> None:
        if block not in running:
            entered.add(block)

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave, always_call=True).remove)
            for part in filter(lambda part: part is not block, block.modules()):
                hook = part.register_forward_pre_hook(partial(look, block))
                stack.callback(hook.remove)
        call()
    return entered


def list_outside_parameters(
    model: nn.Module, blocks: Collection[nn.Module]
) -> Iterator[nn.Parameter]:
    """Yields the parameters that ``model`` reaches through no block, those of a part once each."""
    if model in blocks:
        return
    yield from model.parameters(recurse=False)
    for child in model.children():
        yield from list_outside_parameters(child, blocks)


def get_local_rows(tensor: Tensor) -> Tensor:
    """Returns the rows of ``tensor`` on this process: all of them if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_rows(tensor: Tensor) -> Tensor:
    """Returns all rows of ``tensor``; a collective that every process must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_for_file(tensor: Tensor) -> Tensor:
    """Returns all rows of a sharded tensor, on the CPU of the main process; elsewhere no values.

    A collective that every process must call. One weight at a time fits on a card beside its share
    of a model; all of them do not. A tensor that is not sharded is returned as it is.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0, device="cpu")


def slice_local_rows(full: Tensor, like: Tensor) -> Tensor:
    """Returns the rows of ``full`` that this process holds of ``like``."""
    if not isinstance(like, DTensor):
        return full
    placement = like.placements[0]
    if not isinstance(placement, Shard):
        return full
    parts = torch.chunk(full, like.device_mesh.size(), dim=placement.dim)
    rank = like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else full.narrow(placement.dim, 0, 0)


@torch.no_grad()
def copy_rows_into(target: Tensor, full: Tensor) -> None:
    """Copies the values of ``full`` into ``target``, which may be sharded."""
    get_local_rows(target).copy_(slice_local_rows(full, target))


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Returns ``full`` sharded as ``like`` is, if the shapes are equal; else ``full``."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    local = slice_local_rows(full, like).to(like.device).contiguous()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def shard_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Returns an optimizer's state_dict of full tensors, sharded as the optimizer's parameters."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    sharded = {
        number: {
            name: shard_like(value, weights[number]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": sharded}


def take_local_mask(mask: Tensor | None, weight: Tensor, pattern: Pattern) -> Tensor:
    """Returns the rows of a mask on this process; None stands for a mask that is computed anew."""
    if mask is None:
        return compute_local_mask(weight, pattern)
    return slice_local_rows(mask, weight)


def compute_local_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Returns the mask of the rows of ``weight`` on this process.

    Where masks are decided for several rows together, every process must call this.
    """
    if isinstance(weight, DTensor) and pattern.height > 1:
        return slice_local_rows(pattern.compute_mask(gather_rows(weight.detach())), weight)
    return pattern.compute_mask(get_local_rows(weight.detach()))


def zero_kept_locally(weight: Tensor, pattern: Pattern, mask: Tensor | None = None) -> Tensor:
    """Returns ``(1 - mask) * weight`` of the rows on this process; see ``take_local_mask``."""
    if mask is not None:
        return get_local_rows(weight.detach()).masked_fill(slice_local_rows(mask, weight), 0)
    if isinstance(weight, DTensor) and pattern.height > 1:
        rows = get_local_rows(weight.detach())
        return rows.masked_fill(compute_local_mask(weight, pattern), 0)
    return zero_kept(get_local_rows(weight), pattern)


def gather_state(model: nn.Module) -> Mapping[str, Tensor]:
    """Returns the state_dict of ``model`` for a file of the main process; all must call this."""
    return {name: gather_for_file(tensor) for name, tensor in model.state_dict().items()}
