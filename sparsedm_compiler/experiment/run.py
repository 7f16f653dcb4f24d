"""``run``: one configuration, from the dense model to scored samples; ``describe`` previews it.

open model and data -> compile -> finetune (resumed where it stopped) -> sample -> score
"""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import CheckpointError, FinetuneResult, compile, load
from ..data import ImageData
from ..diffusion.sampling import sample_batches, sampler_name
from ..diffusion.schedulers import make_scheduler
from ..evaluate.process_group import join_process_group, own_share, raising_together
from ..evaluate.score_images import Metrics, prepare_reference, score_images
from ..models import load_weights
from ..progress import announce
from ..reporting.run_record import REAL_IMAGES
from ..train.checkpoint import replace_text
from ..train.finetuning import train_run
from ..train.folder_lock import lock_folder
from ..train.sample_grids import save_real_images
from .describe_run import format_description
from .estimate_run import describe_needs
from .inputs import OpenedInputs, find_betas, make_sample_grids, make_sample_plan
from .opened_run import OpenedRun, get_compile_options, open_run, open_scorer
from .resuming import is_scored_alike
from .run_config import RunConfig
from .training_inputs import is_taught_by_cache, make_run_inputs


def run(config: RunConfig, *, progress: bool = True) -> dict[str, Any]:
    """Runs a configuration and returns the contents of its results.json.

    A run that was interrupted is resumed; of a finished one the results are returned. A folder
    that holds a run of other options, data or weights is refused, and nothing is written. Under
    ``accelerate launch`` every process calls this. Raises SparseDMError.
    """
    folder, state = Path(config.out), join_process_group()
    with raising_together(), announce("opening the model and counting its MACs"):
        opened = open_run(config, state.device)
    if (results := read_finished_results(folder, config)) is not None:
        return results
    with ExitStack() as stack:
        with raising_together():
            if state.is_main_process:
                stack.enter_context(lock_folder(folder))
        if progress and state.is_main_process:
            print(format_description(config, opened), flush=True)
        inputs = make_run_inputs(config, opened)
        with raising_together():
            alone = is_taught_by_cache(config, inputs, opened.teacher)
        student = make_student(opened.teacher, config, alone=alone)
        teacher = None if student is opened.teacher else opened.teacher
        result = train_run(student, teacher, config.train, inputs, progress=progress)
        model = get_final_model(config, opened.teacher, student, result)
        progress = progress and state.is_main_process
        return write_results(config, opened, result, model, progress=progress)


def make_student(teacher: nn.Module, config: RunConfig, *, alone: bool = False) -> nn.Module:
    """Returns the model to train: a copy of ``teacher``.

    It is ``teacher`` itself, pruned in place, for a student that is ``alone``, and where nothing is
    pruned or taught.
    """
    if config.train.sparse:
        options = {**get_compile_options(config), "inplace": alone}
        return compile(teacher, config.prune.pattern, mode="train", **options)
    return teacher if alone or config.train.teacher == "none" else copy.deepcopy(teacher)


def get_final_model(
    config: RunConfig, teacher: nn.Module, student: nn.Module, result: FinetuneResult
) -> nn.Module:
    """Returns the model to sample from: with EMA weights if there are any, unsharded."""
    if not config.train.shard:
        return student if result.ema is None else result.ema
    saved = Path(config.out) / "student.safetensors"
    if config.train.sparse:
        return load(saved, teacher, backend=config.prune.backend)
    return load_weights(copy.deepcopy(teacher), saved)


def write_results(
    config: RunConfig,
    opened: OpenedRun,
    result: FinetuneResult,
    model: nn.Module,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Draws the last sample grid, scores samples of ``model`` and completes results.json."""
    folder, main, inputs = Path(config.out), join_process_group().is_main_process, opened.inputs
    values = result.as_dict(folder.name)
    fast = compile_for_inference(model, config)
    grids = make_sample_grids(config, inputs)
    with announce(f"sampling the last grid of {grids.count} images"):
        images = grids.draw(fast, config.train.objective, betas=find_betas(config))
    values["macs"] = dict(opened.macs)
    values["samples"] = f"samples/{result.images:012d}.png"
    values["scores"] = score_samples(config, inputs, fast, progress=progress)
    values["complete"] = True
    if main:
        grids.save(folder / values["samples"], images)
        save_real_images(grids, folder / REAL_IMAGES, inputs.data, inputs.held_out)
        replace_text(folder / "results.json", json.dumps(values, indent=1) + "\n")
    join_process_group().wait_for_everyone()
    return values


def compile_for_inference(model: nn.Module, config: RunConfig) -> nn.Module:
    """Returns ``model`` masked once, on dense kernels alone, which are the same everywhere."""
    if not config.train.sparse:
        return model
    options = get_compile_options(config)
    return compile(model, config.prune.pattern, mode="infer", kernels={"*": "dense"}, **options)


def score_samples(
    config: RunConfig, inputs: OpenedInputs, model: nn.Module, *, progress: bool
) -> list[dict[str, Any]]:
    """Draws samples and returns their scores, as ``config.score`` defines, as plain values."""
    scorer = open_scorer(config, join_process_group().device)
    if scorer is None:
        return []
    network, reference = scorer
    sampler, objective = config.sample.sampler, config.train.objective
    scheduler = make_scheduler(sampler, objective, betas=find_betas(config))
    plan, spec = make_sample_plan(config, inputs), config.score
    metrics = Metrics(kid=spec.kid, precision_recall=spec.precision_recall)
    known = prepare_reference(network, reference, keep=metrics.keep, progress=progress)
    scores = score_images(
        network,
        sample_batches(model, scheduler, plan, share=own_share(), progress=progress),
        reference=known,
        sampler=sampler_name(scheduler, plan.steps, plan.guidance),
        metrics=metrics,
    )
    return [asdict(score) for score in scores]


def read_finished_results(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """Returns the results of this run if it is finished and scored so, else None.

    Raises CheckpointError.
    """
    try:
        values: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the results in {folder}: {error}") from error
    if not values.get("complete") or not is_scored_alike(folder, config):
        return None
    return values


def describe(config: RunConfig) -> str:
    """Describes in lines of text what ``run`` would do; reads every image and writes nothing.

    Raises SparseDMError.
    """
    opened = open_run(config, torch.device("cpu"))
    opened.inputs.data.check_images(progress=True)
    if opened.inputs.held_out is not None:
        opened.inputs.held_out.check_images(progress=True)
    if opened.scorer is not None and isinstance(opened.scorer[1], ImageData):
        opened.scorer[1].check_images(progress=True)
    return "\n".join([format_description(config, opened), *describe_needs(config, opened)])
