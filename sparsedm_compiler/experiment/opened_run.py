"""``open_run``: opens all that a configuration names and checks it, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ConfigError, MacsReport, count_macs
from ..data import ImageData, open_data
from ..diffusion.condition import move_condition
from ..diffusion.modes import evaluating
from ..diffusion.objective import make_objective
from ..diffusion.predict import build_arguments
from ..evaluate.feature_network import FeatureNetwork
from ..evaluate.features import check_network, load_network
from ..evaluate.score_images import is_statistics
from ..models import open_model
from ..train.check_call import IN_CONFIG, check_call, check_values
from ..train.fingerprints import Fingerprint
from ..train.folder_lock import check_unlocked
from ..train.randomness import drop_conditions
from .inputs import (
    OpenedInputs,
    check_sampling,
    make_sample_plan,
    make_training_scheduler,
    open_inputs,
)
from .resuming import check_inputs, check_options, fingerprint_run
from .run_config import RunConfig


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A checked run: its inputs, its dense model, their fingerprints, and the MACs of an image.

    ``scorer``: the feature network, on the CPU, and the images or statistics to compare with; None
    for a run without scores.
    """

    inputs: OpenedInputs
    scorer: tuple[FeatureNetwork, ImageData | Path] | None
    teacher: nn.Module
    prints: Mapping[str, Fingerprint]
    macs: Mapping[str, int]


def open_run(config: RunConfig, device: torch.device) -> OpenedRun:
    """Opens everything that a configuration names, and checks that all of it goes together.

    Writes nothing. Raises ConfigError where the folder holds another run or is being written by
    another process, DataError where the model does not take the data, and other SparseDMErrors.
    """
    folder = Path(config.out)
    check_options(folder, config)
    make_training_scheduler(config)  # so that its errors come before anything is opened
    check_sampling(config)
    inputs = open_inputs(config, device)
    make_sample_plan(config, inputs)  # so that its errors come before the training
    scorer = open_scorer(config, torch.device("cpu"))  # likewise
    teacher = open_dense_model(config, device)
    prints = fingerprint_run(config, inputs, teacher)
    check_inputs(folder, prints)
    check_unlocked(folder)
    check_model_call(config, inputs, teacher)
    if scorer is not None and inputs.decode is None:
        check_network(scorer[0], inputs.data.shape)
    return OpenedRun(inputs, scorer, teacher, prints, count_run_macs(teacher, config, inputs))


def check_model_call(config: RunConfig, inputs: OpenedInputs, model: nn.Module) -> None:
    """Raises DataError where the model does not take an image of the data and its condition."""
    train = config.train
    objective = make_objective(train.objective, make_training_scheduler(config), train.levels)
    sources = {"the data": inputs.data, "the held-out data": inputs.held_out}
    for source, data in sources.items():
        if data is None:
            continue
        images, condition = data.fetch([0])
        check_values(images, source)
        dropped = None
        if condition is not None and train.drop_condition > 0:
            one = torch.ones(1, dtype=torch.bool, device="cpu")
            dropped = drop_conditions(condition, one, train.null_label, inputs.null)
        if isinstance(condition, Tensor) and data.classes is not None:
            condition = torch.full_like(condition, data.classes - 1)
        check_call(
            model, objective, images, condition, dropped=dropped, source=source, advice=IN_CONFIG
        )


def open_dense_model(config: RunConfig, device: torch.device) -> nn.Module:
    """Opens the model to prune, with its weights; random ones are drawn from ``train.seed``.

    Raises ConfigError and CheckpointError.
    """
    spec = config.model
    with torch.random.fork_rng([]):
        torch.manual_seed(config.train.seed)
        model = open_model(spec.name, options=spec.options, weights=spec.weights)
    return model.to(device)


def get_compile_options(config: RunConfig) -> dict[str, Any]:
    """Returns the options of ``compile`` that hold in every mode, besides the pattern."""
    names = (field.name for field in fields(config.prune) if field.name != "pattern")
    return {name: getattr(config.prune, name) for name in names}


def get_pruning_options(config: RunConfig) -> dict[str, Any]:
    """Returns the options of ``compile`` that decide which weights are pruned."""
    options = get_compile_options(config)
    return {name: value for name, value in options.items() if name not in ("backend", "regional")}


def count_run_macs(teacher: nn.Module, config: RunConfig, inputs: OpenedInputs) -> dict[str, int]:
    """Counts the MACs of one image, dense and pruned. Raises DataError, CaptureError."""
    return report_run_macs(teacher, config, inputs).totals


def make_call(
    teacher: nn.Module, inputs: OpenedInputs, count: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns (args, kwargs) of a call of a run's model with ``count`` images of zeros."""
    parameter = next(teacher.parameters())
    condition = inputs.make_condition(range(count))
    y = None if condition is None else move_condition(condition, parameter)
    x = torch.zeros(count, *inputs.data.shape, device="cpu").to(parameter)
    return build_arguments(teacher, x, torch.zeros(count, device=parameter.device), y)


def report_run_macs(teacher: nn.Module, config: RunConfig, inputs: OpenedInputs) -> MacsReport:
    """Returns the MACs of one image, layer by layer. Raises DataError, CaptureError."""
    args, kwargs = make_call(teacher, inputs, 1)
    options: dict[str, Any] = {"pattern": "1:1"}
    if config.train.sparse:
        options = {"pattern": config.prune.pattern, **get_pruning_options(config)}
    with evaluating(teacher):
        return count_macs(teacher, *args, **options, **kwargs)


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
