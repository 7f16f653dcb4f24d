"""``run``: one configuration from the dense model to scored samples; ``describe`` foretells it.

open model and data -> compile -> finetune (resumed where it stopped) -> sample -> score
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from .. import CheckpointError, ConfigError, compile, count_macs, load
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
from ..train.checkpoint import list_checkpoints, write_whole
from ..train.loop import finetune
from ..train.methods import method_of
from ..train.result import FinetuneResult
from .inputs import Opened, open_all, pictures_of, plan_of
from .run_config import RunConfig


def run(config: RunConfig, *, progress: bool = True) -> dict[str, Any]:
    """Do what ``config`` says and return what its results.json holds.

    A run that was interrupted goes on where it was; of a finished one the results are returned.
    Under ``accelerate launch`` every process calls this. Raises SparseDMError.
    """
    folder, state = Path(config.out), PartialState()
    if (found := finished(folder, config)) is not None:
        return found
    opened = open_all(config, state.device)
    scorer(config, torch.device("cpu"))  # what is wrong with it is said now, not after the training
    teacher = dense_model(config, state.device)
    student = student_of(teacher, config)
    macs = counted(teacher, config, opened)
    if progress and state.is_main_process:
        print(described(config, opened, teacher, macs), flush=True)
    if state.is_main_process:
        write_whole(folder / "run.json", json.dumps(config.as_dict(), indent=2) + "\n")
    result = finetune(
        student,
        None if student is teacher else teacher,
        opened.data,
        config=config.train,
        held_out=opened.held_out,
        null=opened.null,
        pictures=pictures_of(config, opened),
        out=folder,
        progress=progress,
    )
    model = trained(config, teacher, student, result)
    progress = progress and state.is_main_process
    return concluded(config, opened, result, model, macs, progress=progress)


def dense_model(config: RunConfig, device: torch.device) -> nn.Module:
    """The model to prune, with its weights. Raises ConfigError and CheckpointError."""
    spec = config.model
    return open_model(spec.name, options=spec.options, weights=spec.weights, device=device)


def student_of(teacher: nn.Module, config: RunConfig) -> nn.Module:
    """The model to train: ``teacher`` itself where nobody teaches and nothing is pruned."""
    if config.train.sparse:
        return compile(teacher, config.prune.pattern, mode="train", **options_of(config))
    return teacher if config.train.teacher == "none" else copy.deepcopy(teacher)


def trained(
    config: RunConfig, teacher: nn.Module, student: nn.Module, result: FinetuneResult
) -> nn.Module:
    """The model to sample from: the average where there is one, whole in every process."""
    if not config.train.shard:
        return student if result.ema is None else result.ema
    saved = Path(config.out) / "student.safetensors"
    if config.train.sparse:
        return load(saved, teacher, backend=config.prune.backend)
    return load_weights(copy.deepcopy(teacher), saved)


def options_of(config: RunConfig) -> dict[str, Any]:
    """Options of ``compile`` in every mode."""
    return {**pruning(config), "backend": config.prune.backend}


def pruning(config: RunConfig) -> dict[str, Any]:
    """Options of ``compile`` that say which weights are pruned."""
    prune = config.prune
    return {
        "policy": prune.policy,
        "keep_dense": prune.keep_dense,
        "overrides": prune.overrides,
    }


def counted(teacher: nn.Module, config: RunConfig, opened: Opened) -> dict[str, int]:
    """Exact MACs of one image, dense and as this run prunes. Raises DataError, CaptureError."""
    place = next(teacher.parameters())
    given = opened.condition(range(1))
    y = None if given is None else move_condition(given, place)
    x, t = torch.zeros(1, *opened.data.shape).to(place), torch.zeros(1, device=place.device)
    args, kwargs = build_arguments(teacher, x, t, y)
    with evaluating(teacher):
        report = (
            count_macs(teacher, *args, pattern=config.prune.pattern, **pruning(config), **kwargs)
            if config.train.sparse
            else count_macs(teacher, *args, pattern="1:1", **kwargs)
        )
    return report.totals


def concluded(
    config: RunConfig,
    opened: Opened,
    result: FinetuneResult,
    model: nn.Module,
    macs: dict[str, int],
    *,
    progress: bool,
) -> dict[str, Any]:
    """Draw the last grid, score samples of ``model``, and write results.json for good."""
    folder, main = Path(config.out), PartialState().is_main_process
    values = result.as_dict(folder.name)
    fast = folded(model, config)
    pictures = pictures_of(config, opened)
    images = pictures.draw(fast, config.train.objective)
    values["macs"] = macs
    values["samples"] = f"samples/{result.images:012d}.png"
    values["scores"] = scores_of(config, opened, fast, progress=progress)
    values["complete"] = True
    if main:
        pictures.save(folder / values["samples"], images)
        write_whole(folder / "results.json", json.dumps(values, indent=1) + "\n")
    PartialState().wait_for_everyone()
    return values


def folded(model: nn.Module, config: RunConfig) -> nn.Module:
    """``model`` with its masks folded once. Dense kernels alone: they are the same everywhere."""
    if not config.train.sparse:
        return model
    options = options_of(config)
    return compile(model, config.prune.pattern, mode="infer", kernels={"*": "dense"}, **options)


def scores_of(
    config: RunConfig, opened: Opened, model: nn.Module, *, progress: bool
) -> list[dict[str, Any]]:
    """The scores that ``config.score`` asks for, as plain values."""
    found = scorer(config, PartialState().device)
    if found is None:
        return []
    network, reference = found
    scheduler = make_scheduler(config.sample.sampler, config.train.objective)
    plan, spec = plan_of(config, opened), config.score
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


def scorer(
    config: RunConfig, device: torch.device
) -> tuple[FeatureNetwork, ImageData | Path] | None:
    """The network and the images (or statistics) that score a run, None where nothing does.

    Raises ConfigError and DataError.
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


def finished(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The results of this run if it is finished, else None. Raises CheckpointError."""
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
    """What ``run`` would do, in lines for people; opens everything and writes nothing."""
    opened = open_all(config, torch.device("cpu"))
    scorer(config, torch.device("cpu"))
    model = dense_model(config, torch.device("cpu"))
    return described(config, opened, model, counted(model, config, opened))


def described(config: RunConfig, opened: Opened, model: nn.Module, macs: dict[str, int]) -> str:
    """``describe`` of what has been opened."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    train, folder = config.train, Path(config.out)
    saved = list_checkpoints(folder)
    pattern = config.prune.pattern if train.sparse else "none, dense"
    state = f"resumed after {saved[-1]:,} of them" if saved else "a new run"
    lines = [
        f"model      {config.model.name}, {parameters:,} parameters, weights "
        f"{config.model.weights or 'its own or random'}",
        f"method     {train.method}: {method_of(train.method).about}",
        f"pattern    {pattern}, MACs {macs['dense']:,} -> {macs['sparse']:,} "
        f"(attention {macs['attention']:,})",
        f"data       {len(opened.data):,} images {list(opened.data.shape)} from "
        f"{config.data.train}",
        f"training   {train.images:,} images in batches of {train.batch_size}, objective "
        f"{train.objective}; {state}",
        f"score      {config.score.network or 'none'}",
        f"folder     {folder}",
    ]
    return "\n".join(lines)
