"""``TrainingProcess``: one process of a run, alone or in a group; Accelerate does the work."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from .. import ConfigError
from ..diffusion import predict
from ..diffusion.condition import Condition
from ..evaluate.process_group import PATIENCE
from .batches import BatchShare
from .finetune_config import FinetuneConfig
from .fsdp import gather_rows, shard_parameters


class StudentCall(nn.Module):
    """A module that calls the student, for Accelerate to wrap (DDP, autocast) in its stead."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor, t: Tensor, y: Condition | None = None) -> Tensor:
        """Returns the student's prediction."""
        return predict(self.student, x, t, y)


class TrainingProcess:
    """This process of a run: its device, its share of each batch, its student and optimizer.

    ``like``: a parameter of the student, whose device and dtype inputs take. ``optimizer``: the
    one to zero, step and save. ``share``: this process's share of a batch. ``template``: on the
    main process, an unsharded copy to write files from, if ``config.shard``. ``call``: calls the
    student once, before it is sharded. Raises ConfigError where the batch cannot be shared, and for
    fp16 on a CPU.
    """

    def __init__(
        self, student: nn.Module, config: FinetuneConfig, call: Callable[[], None]
    ) -> None:
        self.like = next(student.parameters())
        self.accelerator = make_accelerator(self.like, config.mixed_precision)
        self.share = BatchShare(
            self.accelerator.process_index, self.accelerator.num_processes, config.accumulation
        )
        count = self.share.world * self.share.parts
        if config.batch_size % count:
            raise ConfigError(
                f"batch_size {config.batch_size} is not a multiple of {self.share.world} "
                f"processes times accumulation {config.accumulation}"
            )
        self.student = student
        self.sharded: Any = None
        self.template: nn.Module | None = None
        self.predict: nn.Module = StudentCall(student)
        self.optimizer: Any = None
        if config.shard:
            self.template = copy_to_cpu(student) if self.is_main else None
            shard_parameters(student, self.share.world, call)
            self.sharded = student
            self.like = next(student.parameters())

    def wrap(self, optimizer: torch.optim.Optimizer) -> None:
        """Wraps student and optimizer for the processes, the precision and the device."""
        if self.sharded is not None:
            self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        else:
            self.predict, self.optimizer = self.accelerator.prepare(self.predict, optimizer)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return bool(self.accelerator.is_main_process)

    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        """Returns the context of a backward pass; the ``last`` averages gradients over processes.

        ``last``: whether it is the last micro-batch of the step. Gradients of a sharded student are
        averaged at once, each process keeping its share: until the last they would be whole.
        """
        if last or self.share.world == 1 or self.sharded is not None:
            return nullcontext()
        no_sync: AbstractContextManager[Any] = self.accelerator.no_sync(self.predict)
        return no_sync

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of mixed precision, for student and teacher alike."""
        autocast: AbstractContextManager[Any] = self.accelerator.autocast()
        return autocast

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of ``loss``, scaled where fp16 needs it."""
        self.accelerator.backward(loss)

    def clip_gradient(self, limit: float | None) -> Tensor:
        """Clips the unscaled gradient to norm ``limit``; returns its norm before that."""
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        return gather_rows(clip_grad_norm_(parameters, math.inf if limit is None else limit))

    def share_parameters(self) -> None:
        """Gives all processes the main one's parameters of the student."""
        if self.share.world > 1:
            for parameter in self.student.parameters():
                torch.distributed.broadcast(parameter.data, src=0)

    def average(self, value: Tensor) -> Tensor:
        """Returns the mean of ``value`` over all processes."""
        if self.share.world == 1:
            return value
        mean: Tensor = self.accelerator.reduce(value, "mean")
        return mean

    def is_any(self, flag: bool) -> bool:
        """Returns whether ``flag`` is set in any process."""
        if self.share.world == 1:
            return flag
        return bool(self.average(torch.tensor(float(flag), device=self.like.device)) > 0)

    def wait_for_all(self) -> None:
        """Waits until every process has come this far."""
        self.accelerator.wait_for_everyone()

    def get_scaler_state(self) -> dict[str, Any]:
        """Returns the gradient scaler's state for a checkpoint; empty without a scaler."""
        return {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Restores the gradient scaler from ``get_scaler_state``'s result."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    def release(self) -> None:
        """Takes Accelerate's wrappers off again."""
        self.accelerator.free_memory()


def copy_to_cpu(model: nn.Module) -> nn.Module:
    """Returns a copy of a model on the CPU, without a second one on its device in between."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().to("cpu", copy=True)
        if isinstance(tensor, nn.Parameter):
            there = nn.Parameter(there, tensor.requires_grad)
        memo[id(tensor)] = there
    return copy.deepcopy(model, memo).cpu()


def make_accelerator(like: Tensor, precision: str) -> Accelerator:
    """Returns an Accelerator of that precision on the device of ``like``.

    Accelerate keeps the first precision and device of a process for its lifetime; a second run in
    one process may need others. Raises ConfigError for fp16 on a CPU.
    """
    cpu = like.device.type == "cpu"
    if cpu and precision == "fp16":  # which Accelerate would run in float32 without a word
        raise ConfigError("mixed_precision 'fp16' needs a GPU; 'bf16' runs on a CPU too")
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    elif AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=False)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)  # the main one writes files, alone
    return Accelerator(
        mixed_precision=precision, cpu=cpu, device_placement=False, kwargs_handlers=[patience]
    )
