"""The training loop: resume, train batch after batch, record, finish."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ConfigError, StoppedError
from ..diffusion.condition import take_rows
from ..evaluate.process_group import raising_together
from ..progress import announce, watch_compilation
from ..reporting.run_record import REAL_IMAGES
from .batches import MicroBatch, Stream, check_batch, index_data
from .check_call import check_call, check_values
from .checkpoint import replace_text, save_model
from .lora import merge_adapters
from .mask_options import chooses_masks
from .mask_schedule import begin_masks, settle_masks, update_masks
from .one_shot_start import start_pruned
from .randomness import drop_conditions
from .result import FinetuneResult, HeldOutLoss
from .resume import (
    choose_save_interval,
    describe_origin,
    prepare_student_writer,
    read_last_checkpoint,
    restore_tensors,
    save_run,
)
from .run_folder import hold_folder, write_settings
from .run_log import RunLog
from .sample_grids import save_real_images
from .session import capture_student, session
from .signals import StopRequest
from .stage_switch import begin_stage, set_up_stage
from .state import Run
from .step import take_step
from .teacher_cache import open_teacher_cache
from .training_bar import LOG_BATCHES, format_recent_loss, make_progress_bar
from .validation import held_out_loss

LOG_LINES = 40
"""The log has at least so many lines, where the run has so many steps."""
HELD_OUT = "the held-out data"


def train_to_end(run: Run, progress: bool) -> FinetuneResult:
    """Resumes the run if it has a checkpoint, trains to the end and writes the results."""
    folder = run.inputs.folder
    if progress:
        tqdm.write(str(run.config))
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(hold_folder(folder, run.config, run.inputs))
        checkpoint = None if folder is None else read_last_checkpoint(run, folder)
        set_up_stage(run, None if checkpoint is None else checkpoint.tensors.get("teacher"))
        run.teacher_cache = open_teacher_cache(run, progress)
        stack.enter_context(session(run))
        batches = open_batches(run)
        if chooses_masks(run.config) or checkpoint is not None:
            capture_student(run)
        if checkpoint is not None:
            restore_tensors(run, checkpoint)
        elif run.config.start != "given":
            start_pruned(run, progress)
        begin_masks(run, checkpoint)
        if folder is not None and run.process.is_main:
            write_settings(folder, run.config, run.inputs)
            run.log = RunLog(folder, run.progress.seen)
        try:
            train(run, batches, progress)
        finally:
            if run.log is not None:
                run.log.close()
        return finish(run)


def open_batches(run: Run) -> Iterator[list[MicroBatch]]:
    """Returns the batches that are due, the first of them checked against the models.

    Raises DataError where the models do not take it, ConfigError where no condition stands for
    one that is dropped.
    """
    config, data, seen = run.config, run.inputs.data, run.progress.seen
    if seen >= config.images:
        return iter(())
    share = run.process.share
    with raising_together():
        batches = Stream(data, config.batch_size, config.seed, share, config.workers).start_at(seen)
        first = next(batches)
        check_first_batch(run, first[0])
    return itertools.chain([first], batches)


def check_first_batch(run: Run, batch: MicroBatch) -> None:
    """Raises DataError where the model does not take the first image of a batch, or held out."""
    check_values(batch.images)
    if run.config.flip and batch.images.ndim < 4:
        raise ConfigError(
            f"flip=True mirrors images [B, C, H, W], not packed ones {list(batch.images.shape)}"
        )
    condition, dropped = batch.condition, None
    if condition is not None and run.config.drop_condition > 0:
        one = torch.ones(1, dtype=torch.bool, device="cpu")
        rows = take_rows(condition, range(1))
        dropped = drop_conditions(rows, one, run.config.null_label, run.inputs.null)
    if run.config.shard and run.first_teacher is None:
        return  # all processes must call a sharded student
    model = run.student if run.first_teacher is None else run.first_teacher
    check_call(model, run.objective, batch.images, condition, dropped=dropped)
    held_out = None if run.inputs.held_out is None else index_data(run.inputs.held_out)
    if held_out is not None:
        images, condition = check_batch(held_out[1]([0]))
        check_values(images, HELD_OUT)
        check_call(model, run.objective, images, condition, source=HELD_OUT)


def train(run: Run, batches: Iterator[list[MicroBatch]], progress: bool) -> None:
    """Trains on all batches that are due."""
    config, state, inputs = run.config, run.progress, run.inputs
    if not state.held_out:
        measure_held_out(run)
    run.clock.start()
    with StopRequest(inputs.folder is not None) as stop, make_progress_bar(run, progress) as bar:
        for batch in batches:
            if state.seen >= run.stage.last:
                run.stop_clock()
                while state.seen >= run.stage.last:
                    begin_stage(run)
                run.clock.start()
            before = state.seen
            log = is_log_due(run, before, before + batch[0].total)
            update_masks(run)
            with watch_compilation("compiling the training step") as compiling:
                norm = take_step(run, batch, norm_wanted=log)
            state.seen += batch[0].total
            run.clock.count(batch[0].total, compiling.seconds)
            if not run.pending:  # else the device may still be at work
                run.stop_clock()
            if state.seen >= config.images:
                settle_masks(run)
            record(run, before, norm)
            bar.update(min(state.seen, config.images) - before)
            bar.set_postfix(loss=format_recent_loss(run), refresh=False)
            if run.process.is_any(stop.received):
                save_run(run)
                raise StoppedError(
                    f"stopped after {state.seen} of {config.images} images, as asked; saved in "
                    f"{inputs.folder}: the same command resumes"
                )
            if state.seen >= config.images:
                break


def is_log_due(run: Run, before: int, seen: int) -> bool:
    """Returns whether the step from ``before`` to ``seen`` images gets a line in the log."""
    every = run.config.log_every or min(
        LOG_BATCHES * run.config.batch_size, max(1, run.config.images // LOG_LINES)
    )
    return run.inputs.folder is not None and run.config.is_due(every, before, seen)


def record(run: Run, before: int, norm: Tensor | None) -> None:
    """Writes log, held-out loss, sample grid and checkpoint after a step, if they are due."""
    config, seen = run.config, run.progress.seen
    log = is_log_due(run, before, seen)
    held_out = config.is_due(config.held_out_every, before, seen)
    grid = config.sample_every is not None and config.is_due(config.sample_every, before, seen)
    interval = choose_save_interval(config)
    save = run.inputs.folder is not None and config.is_due(interval, before, seen)
    if not (log or held_out or grid or save):
        return
    run.stop_clock()
    if log:
        write_log(run, norm)
    if held_out:
        measure_held_out(run)
    if grid:
        save_sample_grid(run)
    if save:
        save_run(run)
    run.clock.start()


def write_log(run: Run, norm: Tensor | None) -> None:
    """Writes a line of the log for the steps since the line before."""
    state = run.progress
    window = torch.tensor(state.losses[state.logged :], dtype=torch.float64, device="cpu").mean(
        dim=0
    )
    state.logged = len(state.losses)
    changes = run.masks.measure()
    if run.log is not None:
        lr = float(run.process.optimizer.param_groups[0]["lr"])
        size = None if norm is None else norm.item()
        losses = window.tolist()
        rate = round(median(run.recent_rates), 2) if run.recent_rates else None
        values = {"lr": lr, "grad_norm": size, "flip_rate": changes.rate, "images_per_second": rate}
        run.log.write_losses(state.seen, losses, **values)
        run.recent_rates = []
        run.log.write_density(state.seen, changes.density)


def measure_held_out(run: Run) -> None:
    """Measures and records the held-out losses, if there are held-out data."""
    data = run.inputs.held_out
    if data is None:
        return
    options: dict[str, Any] = {"objective": run.objective, "seed": run.config.seed}
    with announce("measuring the held-out loss"), watch_compilation("compiling the model for it"):
        student, ema = held_out_loss(run.student, data, **options), None
        if run.ema is not None:
            with run.ema.applied():
                ema = held_out_loss(run.student, data, **options)
    run.progress.held_out.append(HeldOutLoss(run.progress.seen, student, ema))
    if run.log is not None:
        run.log.write_held_out(run.progress.seen, student, ema)


def save_sample_grid(run: Run) -> None:
    """Draws and saves a grid of samples, of the EMA weights if there are any."""
    grids, folder = run.inputs.sample_grids, run.inputs.folder
    if grids is None or folder is None:
        return
    with ExitStack() as stack:
        stack.enter_context(announce(f"sampling a grid of {grids.count} images"))
        if run.ema is not None:
            stack.enter_context(run.ema.applied())
        images = grids.draw(run.student, run.config.objective, betas=run.inputs.betas)
    if run.process.is_main:
        grids.save(folder / "samples" / f"{run.progress.seen:012d}.png", images)
        if not (folder / REAL_IMAGES).exists():
            data = run.inputs.data, run.inputs.held_out
            save_real_images(grids, folder / REAL_IMAGES, *data, run.process.like.device)


def finish(run: Run) -> FinetuneResult:
    """Returns the result, and writes student.safetensors and results.json into the folder."""
    state, ema, folder = run.progress, run.ema, run.inputs.folder
    pattern = run.stages[-1].pattern
    result = FinetuneResult(
        run.config,
        tuple(total for total, _, _ in state.losses),
        state.seen,
        state.seconds,
        None if ema is None or run.config.shard else ema.copy_model(run.student),
        tuple(state.held_out),
        None if pattern is None else str(pattern),
        run.process.share.world,
        run.process.like.device.type,
        state.compile_seconds,
        median(state.rates) if state.rates else state.seen / max(state.seconds, 1e-9),
    )
    if run.config.only == "lora":
        merge_adapters(run.student, result.ema)
    if folder is not None:
        save_student = prepare_student_writer(run, ema=True)
        if run.config.only == "lora":  # whose EMA knows the weights of before they were merged
            merged, origin = result.ema or run.student, describe_origin(run)
            save_student = partial(save_model, merged, origin=origin)
        if run.process.is_main:
            save_student(folder / "student.safetensors")
            text = json.dumps(result.as_dict(folder.name), indent=1)
            replace_text(folder / "results.json", text + "\n")
    run.process.wait_for_all()
    return result
