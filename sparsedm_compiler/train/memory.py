"""The memory that a fine-tune needs, computed from the model and its options before it begins.

Weights, gradients, the optimizer's state, EMA and masks are counted to the byte. Activations are
those that autograd keeps for the backward pass, counted in a forward on fake tensors, which have
shapes and no values. What ops need while they run, and the allocator on top, is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import MacsReport
from ..progress import format_bytes
from .ema import get_average_dtype
from .finetune_config import FinetuneConfig
from .fsdp import list_units
from .gradient_checkpointing import is_checkpointing, running_blocks_by
from .mask_options import chooses_masks
from .optimizers import count_state_bytes

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The bytes that one process of a fine-tune keeps, by what they are for.

    Attributes:
        weights: Parameters and buffers of the student.
        gradients: Of the parameters that train.
        optimizer: The optimizer's state.
        ema: The EMA of all parameters.
        masks: Masks that are kept beside the weights.
        teacher: Parameters and buffers of the teacher; 0 without one.
        activations: Tensors kept for the backward pass of one micro-batch, masked weights among
            them.
        gathered: Parameters that a step of a sharded student holds whole at once: all outside of
            blocks, and the largest block.
        recomputed: With gradient checkpointing, what the largest block keeps while it is computed
            again.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    masks: int
    teacher: int
    activations: int
    gathered: int = 0
    recomputed: int = 0

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = [(field.name, getattr(self, field.name)) for field in fields(self)]
        shown = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
        return f"{format_bytes(self.total)}: {shown}"


def estimate_memory(
    model: nn.Module,
    config: FinetuneConfig,
    make_call: Callable[[int], tuple[tuple[Any, ...], Mapping[str, Any]]],
    *,
    pruned: Collection[str] = (),
    taught: bool = True,
    processes: int = 1,
) -> MemoryEstimate:
    """Computes the memory of a fine-tune of ``model``, whose values are not read.

    Args:
        model: The dense model, on any device, the meta device as well.
        config: The options of the fine-tune.
        make_call: Returns (args, kwargs) of a forward of so many images.
        pruned: Names of the parameters that are masked.
        taught: Whether there is a teacher in memory, of the size of the model.
        processes: Number of processes that train together.

    Returns:
        The bytes of one process.
    """
    parameters = dict(model.named_parameters())
    weights, buffers = count_bytes(parameters.values()), count_bytes([*model.buffers()])
    added = list_adapter_weights(model, config.lora_rank) if config.only == "lora" else []
    trained = added or [p for p in parameters.values() if p.requires_grad]
    extra = count_bytes(added)
    widening = sum(w.numel() * (get_average_dtype(w).itemsize - w.itemsize) for w in trained)
    masked = sum(parameters[name].numel() for name in pruned)
    kept_masks = masked * (2 if chooses_masks(config) else 1)  # one to compare with, for the log
    split = processes if config.shard else 1
    images = max(1, config.batch_size // (processes * config.accumulation))
    call = make_call(images)
    activations, recomputed = count_activation_bytes(model, config, call, pruned)
    return MemoryEstimate(
        weights=(weights + extra) // split + buffers,
        gradients=count_bytes(trained) // split,
        optimizer=count_state_bytes(trained, config.optimizer) // split,
        ema=0 if config.ema_decay is None else (weights + extra + widening) // split,
        masks=kept_masks // split,
        teacher=weights + buffers if taught else 0,
        activations=activations + count_loss_bytes(call[0][0], taught=taught),
        gathered=count_gathered_bytes(model) if config.shard else 0,
        recomputed=recomputed,
    )


def list_pruned_names(model: nn.Module, report: MacsReport) -> set[str]:
    """Returns the names of the parameters that the layers of a report would have masked."""
    layers = {row.name for row in report.rows if row.pattern is not None}
    names = [name for name, _ in model.named_parameters()]
    return {n for n in names if not layers.isdisjoint((n, n.removesuffix(".weight")))}


def count_bytes(tensors: Collection[Tensor]) -> int:
    """Returns the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def list_adapter_weights(model: nn.Module, rank: int) -> list[Tensor]:
    """Returns tensors on the meta device like the weights of adapters at all linear layers."""
    return [
        torch.empty(shape, dtype=layer.weight.dtype, device="meta", requires_grad=True)
        for layer in model.modules()
        if type(layer) is nn.Linear
        for shape in ((rank, layer.in_features), (layer.out_features, rank))
    ]


def count_gathered_bytes(model: nn.Module) -> int:
    """Returns the bytes of the parameters that a step of a sharded student holds at once."""
    whole = count_bytes([*model.parameters()])
    sizes = [count_bytes([*unit.parameters()]) for unit in list_units(model)]
    return whole - sum(sizes) + max(sizes, default=0)


def count_loss_bytes(images: Tensor, *, taught: bool) -> int:
    """Returns the bytes that the loss keeps: prediction, target and the teacher's prediction."""
    return images.numel() * 4 * (3 if taught else 2)


class Tally:
    """Bytes that autograd keeps, by the storage of the tensors, beside those that are there anyway.

    ``inside``: the most that one checkpointed block needs while it is computed again.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}
        self.inside = 0

    def watch(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Returns a context in which tensors that are saved are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def run_block(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a block as checkpointing does: its inputs are kept, what is inside is not."""
        inner = Tally()
        self.keep(part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor))
        with inner.watch():
            out = block(*args, **kwargs)
        self.inside = max(self.inside, inner.count(self.kept))
        return out

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that are kept though autograd does not save them."""
        for tensor in tensors:
            self._pack(tensor)

    def count(self, without: Collection[int]) -> int:
        """Returns the bytes of all storages but those in ``without``."""
        return sum(kept.nbytes() for key, kept in self.kept.items() if key not in without)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.kept[storage._cdata] = storage
        return tensor


def count_activation_bytes(
    model: nn.Module,
    config: FinetuneConfig,
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    pruned: Collection[str],
) -> tuple[int, int]:
    """Returns the bytes that autograd keeps, and those of the largest block to compute again."""
    tally, training = Tally(), model.training
    model.train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = {n: make_fake(p) for n, p in model.named_parameters()}
            for name, parameter in model.named_parameters():
                tensors[name].requires_grad_(parameter.requires_grad)
            own = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
            buffers = {name: make_fake(buffer) for name, buffer in model.named_buffers()}
            own |= {buffer.untyped_storage()._cdata for buffer in buffers.values()}
            used = {n: t * 1 if n in pruned else t for n, t in tensors.items()}
            args, kwargs = tree_map_only(Tensor, make_fake, call)
            dtype = AUTOCAST.get(config.mixed_precision)
            autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
            checkpoints = config.gradient_checkpointing or is_checkpointing(model)
            if checkpoints:  # blocks get masked weights as inputs, which stay
                tally.keep(used[name] for name in pruned)
            run = tally.run_block if checkpoints else None
            with running_blocks_by(model, run, by_block=config.shard), tally.watch(), autocast:
                functional_call(model, {**used, **buffers}, args, dict(kwargs))
    finally:
        model.train(training)
    return tally.count(own), tally.inside


def make_fake(tensor: Tensor) -> Tensor:
    """Returns a tensor like ``tensor`` on the CPU; in FakeTensorMode it has no values."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
