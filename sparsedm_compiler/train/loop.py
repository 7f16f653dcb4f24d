"""``finetune``: train a student against the truth and its dense teacher (SparseDM, eq. 9 to 14)."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import ConfigError, StoppedError
from ..diffusion.condition import Condition
from ..diffusion.objective import make_objective
from .batches import Data, Stream
from .checkpoint import write_whole
from .distributed import Engine
from .ema import Average
from .finetune_config import FinetuneConfig
from .fixed_mask import static_mask
from .result import FinetuneResult, HeldOut
from .resume import check_config, restore, resume, save_every, save_run, saving
from .run_log import Logbook, MaskWatch
from .sample_grids import Pictures
from .session import adamw, look_once, refuse_mixed_up, session
from .signals import Stop
from .stage_switch import begin_stage, set_up_stage
from .stages import plan
from .state import Run
from .step import step
from .validation import held_out_loss

LOG_BATCHES, LOG_LINES = 50, 40
"""A line of the log is for so many batches, or for fewer where the run would have fewer lines."""


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
    config = (config or FinetuneConfig()).with_options(options)
    folder = None if out is None else Path(out)
    if config.shard and optimizer is not None:
        raise ConfigError("shard=True replaces the parameters, and no optimizer can know the new")
    engine = Engine(student, config)
    optimizer = adamw(student, config) if optimizer is None else optimizer
    refuse_mixed_up(student, teacher, optimizer)
    engine.take(optimizer)
    run = Run(
        config,
        student,
        given=None if config.teacher == "none" else teacher,
        teacher=None,
        objective=make_objective(config.objective, scheduler, config.levels),
        scheduler=scheduler,
        stages=plan(config, student),
        lrs=[group["lr"] for group in optimizer.param_groups],
        engine=engine,
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
            log = log_due(run, before, before + pieces[0].total)
            norm = step(run, pieces, norm_wanted=log)
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


def log_due(run: Run, before: int, seen: int) -> bool:
    """Whether the step from ``before`` to ``seen`` images gets a line in the log."""
    every = run.config.log_every or min(
        LOG_BATCHES * run.config.batch_size, max(1, run.config.images // LOG_LINES)
    )
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
        run.book.trained(state.seen, window.tolist(), lr=rate, grad_norm=size, flip_rate=flips.rate)
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
        None if average is None or run.config.shard else average.module(run.student),
        tuple(state.held_out),
        None if pattern is None else str(pattern),
        run.engine.share.world,
        run.engine.place.device.type,
    )
    if run.folder is not None:
        save = saving(run, averaged=True)
        if run.engine.main:
            save(run.folder / "student.safetensors")
            text = json.dumps(result.as_dict(run.folder.name), indent=1)
            write_whole(run.folder / "results.json", text + "\n")
    run.engine.wait()
    return result


def recent(run: Run) -> str:
    """The mean of the last losses, for people."""
    found = [total for total, _, _ in run.progress.losses[-LOG_BATCHES:]]
    return f"{sum(found) / len(found):.4f}" if found else "?"


def progress_bar(run: Run, progress: bool) -> tqdm[NoReturn]:
    """A bar that counts images and knows when they will all have been seen."""
    seen, images = run.progress.seen, run.config.images
    name = f"finetune {run.config.method}"
    return tqdm(total=images, initial=seen, unit="img", desc=name, disable=not progress)
