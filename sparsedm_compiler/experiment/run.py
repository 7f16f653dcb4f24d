"""``run``: one configuration, from the dense model to scored samples; ``describe`` previews it.

open model and data -> compile -> finetune (resumed where it stopped) -> sample -> score
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import CheckpointError, ConfigError, FinetuneResult, compile, count_macs, finetune, load
from ..data import ImageData, open_data
from ..diffusion.condition import move_condition
from ..diffusion.modes import evaluating
from ..diffusion.predict import build_arguments
from ..diffusion.sampling import sample_batches, sampler_name
from ..diffusion.schedulers import make_scheduler
from ..evaluate.feature_network import FeatureNetwork
from ..evaluate.features import load_network
from ..evaluate.process_group import own_share
from ..evaluate.score_images import Metrics, is_statistics, prepare_reference, score_images
from ..models import load_weights, open_model
from ..optional_deps import require_extra
from ..progress import announce
from ..train.checkpoint import list_checkpoints, replace_text
from ..train.methods import find_method
from .inputs import OpenedInputs, make_sample_grids, make_sample_plan, open_inputs
from .run_config import RunConfig

with require_extra("a run", "train"):
    from accelerate import PartialState

FLOPS = {"cpu": 5e10, "cuda": 1e13}
"""What a device computes in a second of training, roughly and rather less than more."""
COMPILE_SECONDS = 60
"""What Inductor takes to compile a small model for training the first time, and more."""


def run(config: RunConfig, *, progress: bool = True) -> dict[str, Any]:
    """Runs a configuration and returns the contents of its results.json.

    A run that was interrupted is resumed; of a finished one the results are returned. Under
    ``accelerate launch`` every process calls this. Raises SparseDMError.
    """
    folder, state = Path(config.out), PartialState()
    if (results := read_finished_results(folder, config)) is not None:
        return results
    inputs = open_inputs(config, state.device)
    open_scorer(config, torch.device("cpu"))  # so that its errors come before the training
    with announce("opening the model and counting its MACs"):
        teacher = open_dense_model(config, state.device)
        student = make_student(teacher, config)
        macs = count_run_macs(teacher, config, inputs)
    if progress and state.is_main_process:
        print(format_description(config, inputs, teacher, macs), flush=True)
    if state.is_main_process:
        replace_text(folder / "run.json", json.dumps(config.as_dict(), indent=2) + "\n")
    result = finetune(
        student,
        None if student is teacher else teacher,
        inputs.data,
        config=config.train,
        held_out=inputs.held_out,
        null=inputs.null,
        sample_grids=make_sample_grids(config, inputs),
        out=folder,
        progress=progress,
    )
    model = get_final_model(config, teacher, student, result)
    progress = progress and state.is_main_process
    return write_results(config, inputs, result, model, macs, progress=progress)


def open_dense_model(config: RunConfig, device: torch.device) -> nn.Module:
    """Opens the model to prune, with its weights. Raises ConfigError and CheckpointError."""
    spec = config.model
    return open_model(spec.name, options=spec.options, weights=spec.weights, device=device)


def make_student(teacher: nn.Module, config: RunConfig) -> nn.Module:
    """Returns the model to train: ``teacher`` itself without pruning and without a teacher."""
    if config.train.sparse:
        return compile(teacher, config.prune.pattern, mode="train", **get_compile_options(config))
    return teacher if config.train.teacher == "none" else copy.deepcopy(teacher)


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


def get_compile_options(config: RunConfig) -> dict[str, Any]:
    """Returns the options of ``compile`` that hold in every mode, besides the pattern."""
    names = (field.name for field in fields(config.prune) if field.name != "pattern")
    return {name: getattr(config.prune, name) for name in names}


def get_pruning_options(config: RunConfig) -> dict[str, Any]:
    """Returns the options of ``compile`` that decide which weights are pruned."""
    options = get_compile_options(config)
    del options["backend"]
    return options


def count_run_macs(teacher: nn.Module, config: RunConfig, inputs: OpenedInputs) -> dict[str, int]:
    """Counts the MACs of one image, dense and pruned. Raises DataError, CaptureError."""
    parameter = next(teacher.parameters())
    condition = inputs.make_condition(range(1))
    y = None if condition is None else move_condition(condition, parameter)
    x = torch.zeros(1, *inputs.data.shape).to(parameter)
    t = torch.zeros(1, device=parameter.device)
    args, kwargs = build_arguments(teacher, x, t, y)
    options: dict[str, Any] = {"pattern": "1:1"}
    if config.train.sparse:
        options = {"pattern": config.prune.pattern, **get_pruning_options(config)}
    with evaluating(teacher):
        return count_macs(teacher, *args, **options, **kwargs).totals


def write_results(
    config: RunConfig,
    inputs: OpenedInputs,
    result: FinetuneResult,
    model: nn.Module,
    macs: dict[str, int],
    *,
    progress: bool,
) -> dict[str, Any]:
    """Draws the last sample grid, scores samples of ``model`` and completes results.json."""
    folder, main = Path(config.out), PartialState().is_main_process
    values = result.as_dict(folder.name)
    fast = compile_for_inference(model, config)
    grids = make_sample_grids(config, inputs)
    with announce(f"sampling the last grid of {grids.count} images"):
        images = grids.draw(fast, config.train.objective)
    values["macs"] = macs
    values["samples"] = f"samples/{result.images:012d}.png"
    values["scores"] = score_samples(config, inputs, fast, progress=progress)
    values["complete"] = True
    if main:
        grids.save(folder / values["samples"], images)
        replace_text(folder / "results.json", json.dumps(values, indent=1) + "\n")
    PartialState().wait_for_everyone()
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
    scorer = open_scorer(config, PartialState().device)
    if scorer is None:
        return []
    network, reference = scorer
    scheduler = make_scheduler(config.sample.sampler, config.train.objective)
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


def open_scorer(
    config: RunConfig, device: torch.device
) -> tuple[FeatureNetwork, ImageData | Path] | None:
    """Opens the network and the reference images (or statistics) of a run's scores.

    None for a run without scores. Raises ConfigError and DataError.
    """
    spec = config.score
    if spec.network is None:
        return None
    reference = spec.reference or config.data.held_out
    if reference is None:
        raise ConfigError("score.network needs score.reference or data.held_out to compare with")
    network = load_network(spec.network, device=device)
    if is_statistics(Path(reference)):
        return network, Path(reference)
    return network, open_data(reference, size=config.data.size, labels=False)


def read_finished_results(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """Returns the results of this run if it is finished, else None. Raises CheckpointError."""
    try:
        values: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the results in {folder}: {error}") from error
    if not values.get("complete") or before != config.as_dict():
        return None
    return values


def describe(config: RunConfig) -> str:
    """Describes in lines of text what ``run`` would do; opens everything and writes nothing."""
    inputs = open_inputs(config, torch.device("cpu"))
    open_scorer(config, torch.device("cpu"))
    model = open_dense_model(config, torch.device("cpu"))
    return format_description(config, inputs, model, count_run_macs(model, config, inputs))


def describe_backend(config: RunConfig, macs: dict[str, int], device: torch.device) -> str:
    """Returns what compiles the student, with advice where that may take longer than the run.

    A step multiplies about four times as often as one forward of student and teacher.
    """
    name: str = config.prune.backend
    seconds = 8 * macs["dense"] * config.train.images / FLOPS.get(device.type, FLOPS["cuda"])
    if name == "eager" or seconds > COMPILE_SECONDS:
        return name
    return f"{name}; a run this short may end sooner without compiling: --set prune.backend=eager"


def format_description(
    config: RunConfig, inputs: OpenedInputs, model: nn.Module, macs: dict[str, int]
) -> str:
    """Returns the text of ``describe`` for inputs that are open."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    train, folder = config.train, Path(config.out)
    saved = list_checkpoints(folder)
    pattern = config.prune.pattern if train.sparse else "none, dense"
    state = f"resumed after {saved[-1]:,} of them" if saved else "a new run"
    backend = describe_backend(config, macs, next(model.parameters()).device)
    lines = [
        f"model      {config.model.name}, {parameters:,} parameters, weights "
        f"{config.model.weights or 'its own or random'}",
        f"method     {train.method}: {find_method(train.method).about}",
        f"pattern    {pattern}, MACs {macs['dense']:,} -> {macs['sparse']:,} "
        f"(attention {macs['attention']:,})",
        f"data       {len(inputs.data):,} images {list(inputs.data.shape)} from "
        f"{config.data.train}",
        f"training   {train.images:,} images in batches of {train.batch_size}, objective "
        f"{train.objective}; {state}",
        *([f"backend    {backend}"] if train.sparse else []),
        f"score      {config.score.network or 'none'}",
        f"folder     {folder}",
    ]
    return "\n".join(lines)
