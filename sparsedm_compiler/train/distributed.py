"""``Engine``: one process or many, behind one face; Accelerate does the work."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from .. import ConfigError
from ..diffusion import predict
from ..diffusion.condition import Condition
from .batches import Share
from .finetune_config import FinetuneConfig
from .fsdp import shard, whole


class Predicting(nn.Module):
    """The student as what Accelerate wraps (DDP, autocast): the student itself stays as it is."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor, t: Tensor, y: Condition | None = None) -> Tensor:
        """The student's prediction."""
        return predict(self.student, x, t, y)


class Engine:
    """Steps of a student over however many processes there are, launched by ``accelerate launch``.

    ``optimizer``: the one to zero, step and save. ``share``: this process's part of a batch.
    ``template``: on the main process, an unsharded copy to write files from, if ``config.shard``.
    Raises ConfigError where the batch cannot be shared, and for fp16 on a CPU.
    """

    def __init__(self, student: nn.Module, config: FinetuneConfig) -> None:
        self.place = next(student.parameters())
        self.accelerator = accelerator_for(self.place, config.mixed_precision)
        self.share = Share(
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
        self.predict: nn.Module = Predicting(student)
        self.optimizer: Any = None
        if config.shard:
            self.template = copy.deepcopy(student).cpu() if self.main else None
            shard(student, self.share.world)
            self.sharded = student
            self.place = next(student.parameters())

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """Wrap student and optimizer for what there is: processes, precision, devices."""
        if self.sharded is not None:
            self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        else:
            self.predict, self.optimizer = self.accelerator.prepare(self.predict, optimizer)

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return bool(self.accelerator.is_main_process)

    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        """Around a backward pass: gradients are averaged over processes in the ``last`` one."""
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(last)
            return nullcontext()
        if last or self.share.world == 1:
            return nullcontext()
        found: AbstractContextManager[Any] = self.accelerator.no_sync(self.predict)
        return found

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, for student and teacher alike."""
        found: AbstractContextManager[Any] = self.accelerator.autocast()
        return found

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, scaled where fp16 needs it."""
        self.accelerator.backward(loss)

    def norm(self, limit: float | None) -> Tensor:
        """The norm of the unscaled gradient before it is clipped to ``limit``."""
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        return whole(clip_grad_norm_(parameters, math.inf if limit is None else limit))

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over all processes."""
        if self.share.world == 1:
            return value
        found: Tensor = self.accelerator.reduce(value, "mean")
        return found

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.share.world == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.place.device)) > 0)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def scaler_state(self) -> dict[str, Any]:
        """Of the gradient scaler, for a checkpoint; empty without one."""
        return {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Go on from ``scaler_state``."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    def release(self) -> None:
        """Take the wrappers off again."""
        self.accelerator.free_memory()


def accelerator_for(place: Tensor, precision: str) -> Accelerator:
    """An Accelerator of that precision on the device of ``place``.

    Accelerate keeps the first precision and device of a process for ever; a second run in one
    process may want others. Raises ConfigError for fp16 on a CPU.
    """
    cpu = place.device.type == "cpu"
    if cpu and precision == "fp16":  # which Accelerate would run in float32 without a word
        raise ConfigError("mixed_precision 'fp16' needs a GPU; 'bf16' runs on a CPU too")
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    elif AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(mixed_precision=precision, cpu=cpu, device_placement=False)
