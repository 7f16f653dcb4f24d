"""Whether the options of a fine-tune are in range and go together, and which may change later.

``config`` is a FinetuneConfig everywhere, whose module imports this one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .methods import TEACHERS
from .optimizers import OPTIMIZERS

CHOICES: Mapping[str, tuple[str, ...]] = {
    "schedule": ("cosine", "constant"),
    "objective": ("eps", "v", "x0", "flow"),
    "levels": ("uniform", "logit-normal"),
    "optimizer": tuple(OPTIMIZERS),
    "mixed_precision": ("no", "bf16", "fp16"),
    "teacher": TEACHERS,
    "teacher_dtype": ("fp32", "bf16", "fp16"),
    "only": ("all", "lora"),
    "start": ("given", "obs", "wanda", "magnitude"),
    "score": ("magnitude", "saliency"),
}
NOT_NEGATIVE = ("images", "alpha", "beta", "lr", "weight_decay", "warmup_images", "sr_ste_lambda")
POSITIVE = ("batch_size", "accumulation", "keep", "lora_rank", "mask_every", "start_images")
OPTIONAL = ("max_grad_norm", "held_out_every", "save_every", "log_every", "sample_every", "freeze")
MAY_DIFFER: Mapping[str, str] = {
    "accumulation": "one batch in more or fewer parts, as other devices need it",
    "teacher_cache": "where the teacher's outputs are kept; they are the same",
    "gradient_checkpointing": "whether activations are kept or computed again",
    "shard": "where the parameters lie",
    "workers": "processes that load data",
    "keep": "checkpoints kept",
    "save_every": "when checkpoints are written",
    "log_every": "when the log gets a line",
    "held_out_every": "when the held-out loss is measured",
    "sample_every": "when sample grids are drawn",
}
"""Options that a resumed run may change, and what each decides: not what is learnt."""


def check_values(config: Any) -> None:
    """Raises ConfigError for a value that is out of range."""
    for name in (*NOT_NEGATIVE, *POSITIVE, *OPTIONAL, "drop_condition", "workers"):
        check_number(config, name)
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            options = ", ".join(map(repr, known[:-1])) + f" nor {known[-1]!r}"
            raise ConfigError(f"{name} {getattr(config, name)!r} is neither {options}")
    if config.images == 0 and config.method != "untrained":
        raise ConfigError("images 0 of a fine-tune is not >= 1; method='untrained' trains none")
    if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
        raise ConfigError(f"ema_decay {config.ema_decay} is not in [0, 1); None keeps no average")
    cache = config.teacher_cache
    if cache is not None and (not isinstance(cache, (str, os.PathLike)) or not os.fspath(cache)):
        raise ConfigError(f"teacher_cache {cache!r} is no folder")
    if config.drop_condition > 1:
        raise ConfigError(f"drop_condition {config.drop_condition} is not a share, in [0, 1]")


def check_number(config: Any, name: str) -> None:
    """Raises ConfigError if that option is no finite number in its range."""
    value = getattr(config, name)
    if value is None and name in OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} {value!r} of a fine-tune is not a number")
    if name in OPTIONAL and not value > 0:
        raise ConfigError(f"{name} {value} is not > 0; None switches it off")
    if name in POSITIVE and value < 1:
        raise ConfigError(f"{name} {value} of a fine-tune is not >= 1")
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} {value} of a fine-tune is not >= 0")


def check_pairs(config: Any) -> None:
    """Raises ConfigError for options that do not go together."""
    if config.levels != "uniform" and config.objective != "flow":
        raise ConfigError(f"levels {config.levels!r} are for objective 'flow' alone")
    if config.shard and (config.teacher == "previous" or config.mixed_precision == "fp16"):
        raise ConfigError("shard=True goes with neither teacher 'previous' nor fp16; use bf16")
    if config.shard and config.optimizer != "adamw":
        raise ConfigError(
            f"shard=True spreads the state of optimizer 'adamw' alone, not of {config.optimizer!r}"
        )
    if config.teacher == "previous" and not config.staged:
        raise ConfigError("teacher 'previous' is the student of the stage before: staged=True")
    if config.teacher_cache is not None and (config.teacher != "given" or config.beta == 0):
        raise ConfigError(
            f"teacher_cache keeps the outputs of a dense teacher: it needs teacher 'given' and "
            f"beta > 0, not teacher {config.teacher!r} and beta {config.beta:g}"
        )
    if config.only == "lora" and (config.shard or config.static_mask or not config.sparse):
        raise ConfigError("only='lora' is for methods with masks, not for static_mask or shard")
