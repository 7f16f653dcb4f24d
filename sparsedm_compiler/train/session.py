"""The setup around the loop: the run, its optimizer, modes and hooks, and checks of the models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from .. import ConfigError
from ..diffusion import in_mode, predict
from ..diffusion.condition import move_condition
from ..diffusion.objective import Objective, make_objective
from ..meta_models import require_values
from ..progress import watch_compilation
from .allocator import keep_freed_memory
from .batches import iterate_once
from .check_call import check_call
from .distributed import TrainingProcess
from .ema import Ema
from .finetune_config import FinetuneConfig
from .memory import AUTOCAST
from .optimizers import make_optimizer
from .randomness import draw_values
from .run_inputs import RunInputs
from .run_log import MaskWatch
from .sample_grids import check_grids
from .sr_ste import sr_ste
from .stages import plan_stages
from .state import Run


def open_run(
    student: nn.Module,
    teacher: nn.Module | None,
    config: FinetuneConfig,
    inputs: RunInputs,
    optimizer: torch.optim.Optimizer | None,
) -> Run:
    """Returns a new run, with student and optimizer wrapped for this process.

    ``optimizer``: None is that of the options. Raises ConfigError where the arguments do not go
    together.
    """
    if config.shard and optimizer is not None:
        raise ConfigError("shard=True replaces the parameters, and no optimizer can know the new")
    require_target(teacher, config)
    objective = make_objective(config.objective, inputs.scheduler, config.levels)
    if inputs.sample_grids is not None:
        check_grids(inputs.sample_grids, config.objective, betas=inputs.betas)
    process = TrainingProcess(student, config, partial(call_once, student, objective, inputs))
    optimizer = make_student_optimizer(student, config) if optimizer is None else optimizer
    check_parameters(student, teacher, optimizer)
    process.wrap(optimizer)
    return Run(
        config,
        inputs,
        student,
        first_teacher=None if config.teacher == "none" else teacher,
        teacher=None,
        objective=objective,
        process=process,
        stages=plan_stages(config, student),
        lrs=[group["lr"] for group in optimizer.param_groups],
        ema=None if config.ema_decay is None else Ema(student, config.ema_decay),
        masks=MaskWatch(student),
    )


def call_once(student: nn.Module, objective: Objective, inputs: RunInputs) -> None:
    """Calls the student with the first of the images, as it runs dense and captures nothing.

    Raises DataError where it does not take them.
    """
    for images, condition in iterate_once(inputs.data, 1):
        check_call(student, objective, images, condition)
        return


@contextmanager
def session(run: Run) -> Iterator[ExitStack]:
    """Sets the student to train mode, teachers to eval mode, and SR-STE on, for the block.

    Afterwards modes and random seeds are what they were before. On a CPU freed memory is kept.
    """
    config, devices = run.config, {parameter.device for parameter in run.student.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
        if any(device.type == "cpu" for device in devices):
            stack.enter_context(keep_freed_memory())
        stack.enter_context(in_mode(run.student, training=True))
        if run.first_teacher is not None:
            stack.enter_context(in_mode(run.first_teacher, training=False))
        if config.sr_ste_lambda > 0 and config.only == "all":
            lam, form = config.sr_ste_lambda, config.sr_ste_form
            inner = run.process.optimizer.optimizer
            stack.callback(sr_ste(inner, run.student, lam=lam, form=form).remove)
        yield stack


def capture_student(run: Run) -> None:
    """Calls the student once, which captures it: only then is it known which weights are masked."""
    for images, condition in iterate_once(run.inputs.data, 1):
        values = draw_values(run.config, 0, images.shape)
        x, t, _ = run.objective.prepare(images.cpu(), values.noise, values.u)
        like = run.process.like
        y = None if condition is None else move_condition(condition, like)
        with torch.no_grad(), watch_compilation("capturing the student"):
            predict(run.student, x.to(like), t.to(like.device), y)
        return


def make_student_optimizer(student: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Returns the optimizer of the options, over the trainable parameters of ``student``.

    Raises ConfigError where there are none, or its package is not installed.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(f"{type(student).__name__} has no parameter with requires_grad to train")
    _check_narrow_weights(parameters, config)
    options = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    return make_optimizer(config.optimizer, parameters, options)


def _check_narrow_weights(parameters: list[nn.Parameter], config: FinetuneConfig) -> None:
    """Warns of parameters of which 16 bits train, which keep no small step.

    Raises ConfigError where their gradients would have to be unscaled, too.
    """
    precisions = {dtype: precision for precision, dtype in AUTOCAST.items()}
    narrow = [parameter.dtype for parameter in parameters if parameter.dtype in precisions]
    if config.mixed_precision == "fp16" and torch.float16 in narrow:
        raise ConfigError(
            f"{narrow.count(torch.float16)} weights train in float16, whose scaled gradients "
            "mixed_precision 'fp16' cannot unscale: load the model in float32"
        )
    if narrow:
        dtype, steps = narrow[0], round(2 / torch.finfo(narrow[0]).eps)
        warnings.warn(
            f"{len(narrow)} weights train in {str(dtype).removeprefix('torch.')}, where a step "
            f"below about 1/{steps} of a value is lost: load the model in float32 and set "
            f"mixed_precision={precisions[dtype]!r}",
            stacklevel=2,
        )


def require_target(teacher: nn.Module | None, config: FinetuneConfig) -> None:
    """Raises ConfigError where the loss would be zero, for want of a teacher or of both weights."""
    taught = config.beta > 0 and (teacher is not None or config.teacher == "previous")
    if config.images and config.alpha == 0 and not (taught and config.teacher != "none"):
        raise ConfigError(
            f"method {config.method!r} with alpha 0 learns from a teacher alone, and here is none: "
            "give the dense model as teacher and beta > 0, or set alpha > 0"
        )


def check_parameters(
    student: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer
) -> None:
    """Raises ConfigError for models that cannot be trained, or for what training must not change.

    That is: a model on the meta device, a teacher that would change, a student that would not.
    """
    for model in (student, *(() if teacher is None else (teacher,))):
        require_values(model, "fine-tuning")
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
