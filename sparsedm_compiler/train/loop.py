"""``finetune``: train a student against the noise and its dense teacher (SparseDM, eq. 9 to 14)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from ..errors import ConfigError, SparseDMError
from ..evaluate import generator_at, in_mode, predict, seed_at
from .batches import Data, batches
from .config import FinetuneConfig
from .diffusion import NoiseScheduler, ddpm, drawn, levels, noised
from .held_out import held_out_loss
from .result import FinetuneResult, HeldOut, write_json
from .sr_ste import sr_ste


@dataclass(frozen=True, slots=True)
class Run:
    """Everything one fine-tune works with; ``count``: noise levels of the scheduler."""

    config: FinetuneConfig
    student: nn.Module
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    scheduler: NoiseScheduler
    count: int
    held_out: Data | None
    ema: AveragedModel | None


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    *,
    config: FinetuneConfig | None = None,
    scheduler: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    held_out: Data | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> FinetuneResult:
    """Train ``student`` in place on ``alpha*|eps - eps_s|^2 + beta*|eps_T - eps_s|^2``.

    Both models get the same (x_t, t[, y]); the teacher is only read (None: the first term alone).
    ``data``: images [n, C, H, W] in [-1, 1], (images, labels), a Dataset, or batches of either.
    ``scheduler``: of diffusers, variance-preserving; DDPM with linear betas by default.
    ``optimizer``: replaces AdamW; the schedule then scales its own lr. ``held_out``: data whose
    loss is taken at the start, at the end and every ``held_out_every`` images. ``out``: a folder
    for config.json and result.json. ``options``: fields of FinetuneConfig by name. The order of the
    data and all noise depend on (seed, images seen) alone. Raises SparseDMError.
    """
    config = (config or FinetuneConfig()).having(options)
    scheduler = ddpm() if scheduler is None else scheduler
    optimizer = adamw(student, config) if optimizer is None else optimizer
    refuse_mixed_up(student, teacher, optimizer)
    ema = None if config.ema_decay is None else averaged(student, config.ema_decay)
    count = levels(scheduler)
    run = Run(config, student, teacher, optimizer, scheduler, count, held_out, ema)
    if progress:
        tqdm.write(str(config))
    if out is not None:
        write_json(Path(out) / "config.json", config.as_dict())
    result = train(run, data, progress)
    if out is not None:
        write_json(Path(out) / "result.json", result.as_dict())
    return result


def train(run: Run, data: Data, progress: bool) -> FinetuneResult:
    """The loop, from the first batch to the last."""
    config, student, optimizer, ema = run.config, run.student, run.optimizer, run.ema
    lrs = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    seen, start = 0, time.perf_counter()
    held_out = take_held_out(run, seen)
    with session(run), progress_bar(config, progress) as bar:
        for images, labels in batches(data, config.batch_size, config.seed):
            loss = diffusion_loss(run, images, labels, seen)
            losses.append(finite(loss, seen))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if config.max_grad_norm is not None:
                clip_grad_norm_(student.parameters(), config.max_grad_norm)
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * config.lr_scale(seen, len(images))
            optimizer.step()
            if ema is not None:
                ema.update_parameters(student)
            before, seen = seen, seen + len(images)
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
            bar.update(min(seen, config.images) - before)
            if config.held_out_due(before, seen):
                held_out += take_held_out(run, seen)
            if seen >= config.images:
                break
    seconds = time.perf_counter() - start
    model = None if ema is None else ema.module
    return FinetuneResult(config, tuple(losses), seen, seconds, model, held_out)


def diffusion_loss(run: Run, images: Tensor, labels: Tensor | None, seen: int) -> Tensor:
    """``alpha*mse(eps, eps_s) + beta*mse(eps_T, eps_s)`` at noise and levels of (seed, seen)."""
    config, place = run.config, next(run.student.parameters())
    x0 = images.to(place.device, torch.float32)
    y = None if labels is None else labels.to(place.device)
    noise, t = drawn(x0, run.count, generator_at(config.seed, "noise", seen))
    x = noised(run.scheduler, x0, noise, t).to(place.dtype)
    torch.manual_seed(seed_at(config.seed, "dropout", seen))
    guess = predict(run.student, x, t, y).float()
    loss = config.alpha * F.mse_loss(guess, noise)
    if run.teacher is None or config.beta == 0:
        return loss
    with torch.no_grad():
        target = predict(run.teacher, x, t, y).float()
    return loss + config.beta * F.mse_loss(guess, target)


@contextmanager
def session(run: Run) -> Iterator[None]:
    """Student in train mode, teacher in eval mode, SR-STE on; all modes and seeds come back."""
    config, devices = run.config, {parameter.device for parameter in run.student.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
        stack.enter_context(in_mode(run.student, training=True))
        if run.teacher is not None:
            stack.enter_context(in_mode(run.teacher, training=False))
        if config.sr_ste_lambda > 0:
            lam, form = config.sr_ste_lambda, config.sr_ste_form
            stack.callback(sr_ste(run.optimizer, run.student, lam=lam, form=form).remove)
        yield


def take_held_out(run: Run, seen: int) -> tuple[HeldOut, ...]:
    """The held-out losses after ``seen`` images, or nothing where no data are held out."""
    if run.held_out is None:
        return ()
    config, scheduler, data = run.config, run.scheduler, run.held_out
    student = held_out_loss(run.student, data, scheduler=scheduler, seed=config.seed)
    if run.ema is None:
        return (HeldOut(seen, student, None),)
    model = run.ema.module
    return (
        HeldOut(seen, student, held_out_loss(model, data, scheduler=scheduler, seed=config.seed)),
    )


def progress_bar(config: FinetuneConfig, progress: bool) -> tqdm[NoReturn]:
    """A bar that counts images."""
    return tqdm(total=config.images, unit="img", desc="finetune", disable=not progress)


def adamw(student: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of ``student``. Raises ConfigError for none."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(f"{type(student).__name__} has no parameter with requires_grad to train")
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )


def averaged(student: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``student`` for its moving average, which starts from the weights of now."""

    def blend(average: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        return torch.lerp(average, current, 1 - min(decay, (1 + int(steps)) / (10 + int(steps))))

    found = AveragedModel(student, avg_fn=blend)
    found.update_parameters(student)  # the first update copies
    return found


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


def finite(loss: Tensor, seen: int) -> float:
    """The value of ``loss``. Raises SparseDMError for NaN and Inf."""
    value = loss.item()
    if not math.isfinite(value):
        raise SparseDMError(
            f"the loss is {value} after {seen} images: check the data for NaN, lower lr or "
            "set max_grad_norm; the student holds the weights of the step before"
        )
    return value
