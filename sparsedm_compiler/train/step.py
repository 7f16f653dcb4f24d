"""One optimizer step: the loss at this process's pieces of a batch, its gradient, the update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion import predict, seed_at
from ..diffusion.condition import move_condition
from .batches import Piece
from .randomness import draw, dropped, flipped
from .state import Run


def step(run: Run, pieces: list[Piece], *, norm_wanted: bool) -> Tensor | None:
    """One optimizer step on this process's pieces of a batch; the gradient's norm where wanted."""
    config, engine, optimizer = run.config, run.engine, run.engine.optimizer
    seen, total = run.progress.seen, pieces[0].total
    optimizer.zero_grad()
    terms = torch.zeros(3, dtype=torch.float64, device=engine.place.device)
    for number, piece in enumerate(pieces):
        with engine.syncing(last=number == len(pieces) - 1):
            found = loss_terms(run, piece)
            share = len(piece.images) * engine.share.world / total
            terms += found.detach() * share
            engine.backward(found[0] * share)
    run.add_loss(terms)
    norm = None
    if config.max_grad_norm is not None or norm_wanted:
        norm = engine.norm(config.max_grad_norm)
    stage, span = (seen, None) if config.teacher != "previous" else staged(run)
    for group, lr in zip(optimizer.param_groups, run.lrs, strict=True):
        group["lr"] = lr * config.lr_scale(stage, total, span)
    optimizer.step()
    if run.average is not None:
        run.average.update()
    return norm


def staged(run: Run) -> tuple[int, int]:
    """Images seen since the stage began, and those it will have seen."""
    return run.progress.seen - run.stage.first, run.stage.last - run.stage.first


def loss_terms(run: Run, piece: Piece) -> Tensor:
    """[alpha*noise + beta*teacher, noise, teacher]: mean squared errors, at draws of (seed, k)."""
    config, place = run.config, run.engine.place
    random = draw(config, piece.first, piece.images.shape)
    x0 = piece.images.to(place.device, torch.float32)
    if config.flip:
        x0 = flipped(x0, random.flip)
    condition = dropped(piece.condition, random.drop, config.null_label, run.null)
    y = None if condition is None else move_condition(condition, place)
    x, t, target = run.objective.prepare(
        x0, random.noise.to(place.device), random.u.to(place.device)
    )
    x = x.to(place.dtype)
    torch.manual_seed(seed_at(config.seed, "dropout", piece.first))
    with run.engine.autocast():
        guess = run.engine.predict(x, t, y).float()
    noise = F.mse_loss(guess, target)
    if run.teacher is None or config.beta == 0:
        loss = config.alpha * noise
        return torch.stack([loss, noise, torch.zeros_like(noise)])
    with torch.no_grad(), run.engine.autocast():
        taught = predict(run.teacher, x, t, y)
    teacher = F.mse_loss(guess, taught.float())
    return torch.stack([config.alpha * noise + config.beta * teacher, noise, teacher])
