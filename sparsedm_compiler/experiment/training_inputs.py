"""The inputs of the fine-tune of a run, and whether it needs its teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..train.fingerprints import describe_images, describe_model
from ..train.run_folder import WHOLE
from ..train.run_inputs import RunInputs
from ..train.teacher_cache import count_positions, describe_teaching, find_cache
from .inputs import make_sample_grids, make_training_scheduler
from .opened_run import OpenedRun
from .run_config import RunConfig


def make_run_inputs(config: RunConfig, opened: OpenedRun) -> RunInputs:
    """Returns all that the fine-tune of a run gets beside models and options."""
    inputs, prints = opened.inputs, opened.prints
    known = {
        "teacher": replace(prints["model.weights"], about=describe_model(opened.teacher)),
        "data": replace(prints["data.train"], about=describe_images(inputs.data)),
    }
    return RunInputs(
        inputs.data,
        make_training_scheduler(config),
        inputs.held_out,
        inputs.null,
        make_sample_grids(config, inputs),
        Path(config.out),
        prints,
        known,
        {WHOLE: json.dumps(config.as_dict(), indent=2) + "\n"},
    )


def is_taught_by_cache(config: RunConfig, inputs: RunInputs, teacher: nn.Module) -> bool:
    """Returns whether all of the teacher's outputs are on the disk, so that it need not stay.

    Raises ConfigError where the cache holds those of another run.
    """
    train = config.train
    if train.teacher_cache is None or train.shard:
        return False
    about = describe_teaching(train, inputs, teacher)
    cache = find_cache(Path(train.teacher_cache), train, inputs, about)
    return cache.count_missing(0, count_positions(train)) == 0
