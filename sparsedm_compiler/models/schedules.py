"""The noise schedule that a diffusers pipeline keeps beside its model, in ``../scheduler``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..diffusion.schedulers import PREDICTIONS, get_betas
from ..errors import ConfigError

FILE = "scheduler_config.json"


@dataclass(frozen=True, slots=True)
class TrainedSchedule:
    """The noise schedule that a model was trained with, as the pipeline's folder says.

    ``objective``: what the model predicts, "eps", "v", "x0" or "flow". ``betas``: its noise levels,
    as ``make_scheduler`` takes them; None for "flow". ``source``: the file that says so.
    """

    objective: str
    betas: Mapping[str, Any] | None
    source: Path


def read_schedule(spec: str) -> TrainedSchedule | None:
    """Reads the schedule beside the model that ``spec`` names, a folder of a diffusers pipeline.

    Returns None where there is none. Raises ConfigError for a file that cannot be read, and for a
    prediction that is not known.
    """
    path = Path(spec)
    file = (path if path.is_dir() else path.parent).parent / "scheduler" / FILE
    if not path.exists() or not file.exists():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name, prediction = config["_class_name"], config.get("prediction_type", "epsilon")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read {file}: {error!r}") from error
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return TrainedSchedule("flow", None, file)
    objectives = {kind: objective for objective, kind in PREDICTIONS.items()}
    if prediction not in objectives:
        raise ConfigError(
            f"{file} says prediction_type {prediction!r}; known: {', '.join(objectives)}"
        )
    return TrainedSchedule(objectives[prediction], get_betas(config), file)
