"""The inputs of the fine-tune of a run, and whether it needs its teacher."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from ..train.run_folder import WHOLE
from ..train.run_inputs import RunInputs
from ..train.teacher_cache import count_positions, find_cache
from .inputs import make_sample_grids, make_training_scheduler
from .opened_run import OpenedRun
from .run_config import RunConfig


def make_run_inputs(config: RunConfig, opened: OpenedRun) -> RunInputs:
    """Returns all that the fine-tune of a run gets beside models and options."""
    inputs = opened.inputs
    return RunInputs(
        inputs.data,
        make_training_scheduler(config),
        inputs.held_out,
        inputs.null,
        make_sample_grids(config, inputs),
        Path(config.out),
        opened.prints,
        {WHOLE: json.dumps(config.as_dict(), indent=2) + "\n"},
    )


def is_taught_by_cache(config: RunConfig, inputs: RunInputs, teacher: nn.Module) -> bool:
    """Returns whether all of the teacher's outputs are on the disk, so that it need not stay.

    Raises ConfigError where the cache holds those of another run.
    """
    train = config.train
    if train.teacher_cache is None or train.shard:
        return False
    cache = find_cache(Path(train.teacher_cache), train, inputs, teacher)
    return cache.count_missing(0, count_positions(train)) == 0
