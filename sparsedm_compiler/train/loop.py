"""``finetune``: train a student against the truth and its dense teacher (SparseDM, eq. 9 to 14)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import ConfigError, StoppedError
from ..evaluate import in_mode, predict, seed_at
from ..evaluate.condition import Condition, placed
from .average import Average
from .batches import Data, Piece, Stream, one_pass
from .checkpoint import write_whole
from .config import FinetuneConfig
from .draws import draw, dropped, flipped
from .engine import Engine
from .held_out import held_out_loss
from .keeping import check_config, restore, resume, save_averaged, save_every, save_run
from .logbook import Logbook, MaskWatch
from .objective import objective_of
from .pictures import Pictures
from .result import FinetuneResult, HeldOut
from .signals import Stop
from .sr_ste import sr_ste
from .stages import plan
from .staging import begin_stage, set_up_stage
from .state import Run
from .static import static_mask

LOG_BATCHES = 50


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    *,
    config: FinetuneConfig | None = None,
    scheduler: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    held_out: Data | None = None,
    null: Condition | None = None,
    pictures: Pictures | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> FinetuneResult:
    """Train ``student`` in place on ``alpha*|target - s|^2 + beta*|teacher - s|^2``.

    Both models get the same (x_t, t[, condition]); the teacher is only read (None: the first term
    alone). ``data``: images [n, C, H, W] in [-1, 1], (images, labels), a Dataset, or batches of
    either. ``options``: fields of FinetuneConfig by name, a ``method`` bringing its own.
    ``scheduler``: of diffusers, variance-preserving; DDPM with linear betas by default.
    ``optimizer``: replaces AdamW; the schedule then scales its own lr. ``held_out``: data whose
    loss is taken at the start, at the end and every ``held_out_every`` images. ``null``: the
    condition, one row, that stands for none. ``pictures``: grids to draw every ``sample_every``.

    ``out``: a folder for checkpoints, log, curves and results.json. The same call with the same
    folder resumes a run that was interrupted, exactly (on the CPU to the bit); SIGTERM and Ctrl-C
    save and raise StoppedError. Under ``accelerate launch`` every process calls this and takes its
    share of each batch; put the models on the process's device before. Order of the data and all
    noise depend on (seed, position) alone. Raises SparseDMError.
    """
    config = (config or FinetuneConfig()).having(options)
    folder = None if out is None else Path(out)
    optimizer = adamw(student, config) if optimizer is None else optimizer
    refuse_mixed_up(student, teacher, optimizer)
    run = Run(
        config,
        student,
        given=None if config.teacher == "none" else teacher,
        teacher=None,
        objective=objective_of(config.objective, scheduler, config.levels),
        scheduler=scheduler,
        stages=plan(config, student),
        lrs=[group["lr"] for group in optimizer.param_groups],
        engine=Engine(student, optimizer, config),
        data=data,
        held_out=held_out,
        null=null,
        pictures=pictures,
        folder=folder,
        average=None if config.ema_decay is None else Average(student, config.ema_decay),
        watch=MaskWatch(student),
    )
    try:
        return execute(run, progress and run.engine.main)
    finally:
        run.engine.release()


def execute(run: Run, progress: bool) -> FinetuneResult:
    """Resume if there is what to resume, train, and write what there is to write."""
    if progress:
        tqdm.write(str(run.config))
    found = None
    if run.folder is not None:
        if run.engine.main:
            check_config(run.folder, run.config)
        run.engine.wait()
        found = resume(run)
    set_up_stage(run, None if found is None else found.tensors.get("teacher"))
    with session(run) as stack:
        if run.config.static_mask or found is not None:
            look_once(run)
        if found is not None:
            restore(run, found)
        if run.config.static_mask:
            stack.callback(static_mask(run.engine.optimizer.optimizer, run.student).remove)
        if run.folder is not None and run.engine.main:
            run.book = Logbook(run.folder, run.progress.seen)
        try:
            train(run, progress)
        finally:
            if run.book is not None:
                run.book.close()
    return finish(run)


def train(run: Run, progress: bool) -> None:
    """The loop, from the first batch to the last."""
    config, state = run.config, run.progress
    stream = Stream(run.data, config.batch_size, config.seed, run.engine.share, config.workers)
    batches = stream.begin(state.seen) if state.seen < config.images else iter(())
    if not state.held_out:
        take_held_out(run)
    with Stop(run.folder is not None) as stop, progress_bar(run, progress) as bar:
        for pieces in batches:
            while state.seen >= run.stage.last:
                begin_stage(run)
            started, before = time.perf_counter(), state.seen
            norm = step(run, pieces)
            state.seen += pieces[0].total
            state.seconds += time.perf_counter() - started
            record(run, before, norm)
            bar.update(min(state.seen, config.images) - before)
            bar.set_postfix(loss=recent(run), refresh=False)
            if run.engine.any(stop.asked):
                save_run(run)
                raise StoppedError(
                    f"stopped after {state.seen} of {config.images} images, as asked; saved in "
                    f"{run.folder}: the same command resumes"
                )
            if state.seen >= config.images:
                break


def step(run: Run, pieces: list[Piece]) -> Tensor | None:
    """One optimizer step on this process's pieces of a batch; the gradient's norm where known."""
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
    if config.max_grad_norm is not None or log_due(run, seen, seen + total):
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
    y = None if condition is None else placed(condition, place)
    x, t, target = run.objective.ask(x0, random.noise.to(place.device), random.u.to(place.device))
    x = x.to(place.dtype)
    torch.manual_seed(seed_at(config.seed, "dropout", piece.first))
    guess = run.engine.predict(x, t, y).float()
    noise = F.mse_loss(guess, target)
    if run.teacher is None or config.beta == 0:
        loss = config.alpha * noise
        return torch.stack([loss, noise, torch.zeros_like(noise)])
    with torch.no_grad(), run.engine.autocast():
        taught = predict(run.teacher, x, t, y)
    teacher = F.mse_loss(guess, taught.float())
    return torch.stack([config.alpha * noise + config.beta * teacher, noise, teacher])


def log_due(run: Run, before: int, seen: int) -> bool:
    """Whether the step from ``before`` to ``seen`` images gets a line in the log."""
    every = run.config.log_every or LOG_BATCHES * run.config.batch_size
    return run.folder is not None and run.config.due(every, before, seen)


def record(run: Run, before: int, norm: Tensor | None) -> None:
    """After a step: log, held-out loss, pictures and checkpoint, each where it is due."""
    config, seen = run.config, run.progress.seen
    if log_due(run, before, seen):
        write_log(run, norm)
    if config.due(config.held_out_every, before, seen):
        take_held_out(run)
    if config.sample_every is not None and config.due(config.sample_every, before, seen):
        take_pictures(run)
    if run.folder is not None and config.due(save_every(config), before, seen):
        save_run(run)


def write_log(run: Run, norm: Tensor | None) -> None:
    """A line of the log for the steps since the line before."""
    run.drain()
    state = run.progress
    window = torch.tensor(state.losses[state.logged :], dtype=torch.float64).mean(dim=0)
    state.logged = len(state.losses)
    flips = run.watch.look()
    if run.book is not None:
        rate = run.engine.optimizer.param_groups[0]["lr"]
        size = None if norm is None else norm.item()
        run.book.trained(
            state.seen, window.tolist(), lr=rate, grad_norm=size, flip_rate=flips.rate
        )
        run.book.density(state.seen, flips.density)


def take_held_out(run: Run) -> None:
    """Note the held-out losses of now, where data are held out."""
    if run.held_out is None:
        return
    given: dict[str, Any] = {"objective": run.objective, "seed": run.config.seed}
    student, ema = held_out_loss(run.student, run.held_out, **given), None
    if run.average is not None:
        with run.average.applied():
            ema = held_out_loss(run.student, run.held_out, **given)
    run.progress.held_out.append(HeldOut(run.progress.seen, student, ema))
    if run.book is not None:
        run.book.held_out(run.progress.seen, student, ema)


def take_pictures(run: Run) -> None:
    """Draw the samples of now, of the average where there is one."""
    if run.pictures is None or run.folder is None:
        return
    with ExitStack() as stack:
        if run.average is not None:
            stack.enter_context(run.average.applied())
        images = run.pictures.draw(run.student, run.config.objective)
    if run.engine.main:
        run.pictures.save(run.folder / "samples" / f"{run.progress.seen:012d}.png", images)


def finish(run: Run) -> FinetuneResult:
    """The result, and in the folder student.safetensors and results.json."""
    state, average = run.progress, run.average
    pattern = run.stages[-1].pattern
    result = FinetuneResult(
        run.config,
        tuple(total for total, _, _ in state.losses),
        state.seen,
        state.seconds,
        None if average is None else average.module(run.student),
        tuple(state.held_out),
        None if pattern is None else str(pattern),
        run.engine.share.world,
        run.engine.place.device.type,
    )
    if run.folder is not None and run.engine.main:
        save_averaged(run, run.folder / "student.safetensors")
        text = json.dumps(result.as_dict(run.folder.name), indent=1)
        write_whole(run.folder / "results.json", text + "\n")
    run.engine.wait()
    return result


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
        x, t, _ = run.objective.ask(images, random.noise, random.u)
        place = run.engine.place
        y = None if condition is None else placed(condition, place)
        with torch.no_grad():
            predict(run.student, x.to(place), t.to(place.device), y)
        return


def recent(run: Run) -> str:
    """The mean of the last losses, for people."""
    found = [total for total, _, _ in run.progress.losses[-LOG_BATCHES:]]
    return f"{sum(found) / len(found):.4f}" if found else "?"


def progress_bar(run: Run, progress: bool) -> tqdm[NoReturn]:
    """A bar that counts images and knows when they will all have been seen."""
    seen, images = run.progress.seen, run.config.images
    name = f"finetune {run.config.method}"
    return tqdm(total=images, initial=seen, unit="img", desc=name, disable=not progress)


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
