"""What is set up around the loop: optimizer, modes, hooks, and the refusal of mixed-up models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .. import ConfigError
from ..diffusion import in_mode, predict
from ..diffusion.condition import move_condition
from .batches import one_pass
from .finetune_config import FinetuneConfig
from .randomness import draw
from .sr_ste import sr_ste
from .state import Run


@contextmanager
def session(run: Run) -> Iterator[ExitStack]:
    """Student in train mode, teacher in eval mode, SR-STE on; all modes and seeds come back."""
    config, devices = run.config, {parameter.device for parameter in run.student.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
        stack.enter_context(in_mode(run.student, training=True))
        if run.given is not None:
            stack.enter_context(in_mode(run.given, training=False))
        if config.sr_ste_lambda > 0:
            lam, form = config.sr_ste_lambda, config.sr_ste_form
            inner = run.engine.optimizer.optimizer
            stack.callback(sr_ste(inner, run.student, lam=lam, form=form).remove)
        yield stack


def look_once(run: Run) -> None:
    """Call the student once, which captures it: only then is it known what is masked."""
    for images, condition in one_pass(run.data, 1):
        random = draw(run.config, 0, images.shape)
        x, t, _ = run.objective.prepare(images, random.noise, random.u)
        place = run.engine.place
        y = None if condition is None else move_condition(condition, place)
        with torch.no_grad():
            predict(run.student, x.to(place), t.to(place.device), y)
        return


def adamw(student: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of ``student``. Raises ConfigError for none."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(f"{type(student).__name__} has no parameter with requires_grad to train")
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )


def refuse_mixed_up(
    student: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer
) -> None:
    """Raise ConfigError where the teacher would be trained or the student would not."""
    ours = {id(parameter) for parameter in student.parameters()}
    if teacher is not None and any(id(parameter) in ours for parameter in teacher.parameters()):
        raise ConfigError(
            "student and teacher share parameters, so the teacher would change while it teaches; "
            "compile makes a copy unless inplace=True, copy.deepcopy does too"
        )
    groups = optimizer.param_groups
    if not all(id(parameter) in ours for group in groups for parameter in group["params"]):
        raise ConfigError(
            "the optimizer holds parameters that the student does not have; build it on "
            "student.parameters()"
        )
