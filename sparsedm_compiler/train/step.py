"""One optimizer step: loss of this process's part of a batch, gradient, update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion import seed_at
from ..diffusion.condition import move, move_condition
from .batches import MicroBatch
from .randomness import draw_values, drop_conditions, flip_images
from .state import Run
from .teacher_cache import get_teacher_output


def take_step(run: Run, batch: list[MicroBatch], *, norm_wanted: bool) -> Tensor | None:
    """Takes one optimizer step on this process's part of a batch.

    Returns the norm of the gradient before clipping, where it is wanted or clipped, else None.
    """
    config, process, optimizer = run.config, run.process, run.process.optimizer
    total = batch[0].total
    optimizer.zero_grad()
    terms = torch.zeros(3, dtype=torch.float64, device=process.like.device)
    for number, micro_batch in enumerate(batch):
        with process.syncing(last=number == len(batch) - 1):
            losses = compute_losses(run, micro_batch)
            share = len(micro_batch.images) * process.share.world / total
            terms += losses.detach() * share
            process.backward(losses[0] * share)
    run.add_loss(terms)
    norm = None
    if config.max_grad_norm is not None or norm_wanted:
        norm = process.clip_gradient(config.max_grad_norm)
    scale = compute_stage_lr_scale(run, total)
    for group, lr in zip(optimizer.param_groups, run.lrs, strict=True):
        group["lr"] = lr * scale
    optimizer.step()
    if run.ema is not None:
        run.ema.update()
    return norm


def compute_stage_lr_scale(run: Run, total: int) -> float:
    """Returns the schedule's factor for the next step, on a batch of ``total`` images.

    With teacher "previous" every stage has a schedule of its own.
    """
    config, stage, seen = run.config, run.stage, run.progress.seen
    if config.teacher == "previous":
        return config.compute_lr_scale(seen - stage.first, total, stage.last - stage.first)
    return config.compute_lr_scale(seen, total)


def compute_losses(run: Run, micro_batch: MicroBatch) -> Tensor:
    """Returns [alpha*noise + beta*teacher, noise, teacher]: mean squared errors.

    Noise, level, flip and dropped condition of image k come from (seed, k).
    """
    config, like = run.config, run.process.like
    values = draw_values(config, micro_batch.first, micro_batch.images.shape)
    x0 = move(micro_batch.images, like.device).float()
    if config.flip:
        x0 = flip_images(x0, values.flip)
    condition = drop_conditions(
        micro_batch.condition, values.drop, config.null_label, run.inputs.null
    )
    y = None if condition is None else move_condition(condition, like)
    noise, u = move(values.noise, like.device), move(values.u, like.device)
    x, t, target = run.objective.prepare(x0, noise, u)
    torch.manual_seed(seed_at(config.seed, "dropout", micro_batch.first))
    with run.process.autocast():
        guess = run.process.predict(x.to(like.dtype), t, y).float()
    loss = F.mse_loss(guess, target)
    taught = None
    if config.beta != 0:
        taught = get_teacher_output(run, micro_batch.first, x, t, condition)
    if taught is None:
        return torch.stack([config.alpha * loss, loss, torch.zeros_like(loss)])
    teacher = F.mse_loss(guess, taught.float())
    return torch.stack([config.alpha * loss + config.beta * teacher, loss, teacher])
