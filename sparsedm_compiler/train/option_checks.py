"""Whether the options of a fine-tune are in range and go together, and which may change later.

``config`` is a FinetuneConfig everywhere, whose module imports this one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .. import Pattern
from ..errors import ConfigError
from ..option_values import check_real, check_seed, check_switch, check_whole
from .methods import TEACHERS
from .optimizers import OPTIMIZERS
from .sr_ste import FORMS

CHOICES: Mapping[str, tuple[str, ...]] = {
    "schedule": ("cosine", "constant"),
    "objective": ("eps", "v", "x0", "flow"),
    "levels": ("uniform", "logit-normal"),
    "optimizer": tuple(OPTIMIZERS),
    "mixed_precision": ("no", "bf16", "fp16"),
    "teacher": TEACHERS,
    "teacher_dtype": ("fp32", "bf16", "fp16"),
    "sr_ste_form": FORMS,
    "only": ("all", "lora"),
    "start": ("given", "obs", "wanda", "magnitude"),
    "score": ("magnitude", "saliency"),
}
WHOLE: Mapping[str, int] = {
    **dict.fromkeys(("images", "warmup_images", "workers"), 0),
    **dict.fromkeys(("batch_size", "accumulation", "keep", "lora_rank"), 1),
    **dict.fromkeys(("mask_every", "start_images"), 1),
}
"""Options that are whole numbers, and the least value of each."""
INTERVALS = ("held_out_every", "save_every", "log_every", "sample_every")
"""Whole numbers of images; None switches them off."""
COUNTS = (*WHOLE, *INTERVALS, "seed", "null_label")
NOT_NEGATIVE = ("alpha", "beta", "lr", "weight_decay", "sr_ste_lambda")
POSITIVE = ("max_grad_norm", "freeze")
"""Real numbers; None switches them off."""
SWITCHES = ("static_mask", "soft_threshold", "staged", "gradient_checkpointing", "shard", "flip")
OWNER = " of a fine-tune"
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
    """Raises ConfigError for a value of the wrong type, or out of range."""
    check_counts(config)
    check_reals(config)
    check_decays(config)
    for name in SWITCHES:
        check_switch(name, getattr(config, name), owner=OWNER)
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            options = ", ".join(map(repr, known[:-1])) + f" nor {known[-1]!r}"
            raise ConfigError(f"{name} {getattr(config, name)!r} is neither {options}")
    if not isinstance(config.stages, (list, tuple)):
        raise ConfigError(f"stages {config.stages!r} is no list of patterns, e.g. ['3:4', '2:4']")
    for pattern in config.stages:
        Pattern.parse(pattern)
    cache = config.teacher_cache
    if cache is not None and (not isinstance(cache, (str, os.PathLike)) or not os.fspath(cache)):
        raise ConfigError(f"teacher_cache {cache!r} is no folder")


def check_counts(config: Any) -> None:
    """Raises ConfigError for a count, an interval, a label or a seed that is no whole number."""
    for name, least in WHOLE.items():
        check_whole(name, getattr(config, name), least=least, owner=OWNER)
    if config.images == 0 and config.method != "untrained":
        raise ConfigError("images 0 of a fine-tune is not >= 1; method='untrained' trains none")
    for name in INTERVALS:
        if check_positive(config, name):
            check_whole(name, getattr(config, name), least=1, owner=OWNER)
    if config.null_label is not None:
        check_whole("null_label", config.null_label, owner=OWNER)
    check_seed("seed", config.seed, owner=OWNER)


def check_reals(config: Any) -> None:
    """Raises ConfigError for a rate, weight or share that is no finite number in its range."""
    for name in (*NOT_NEGATIVE, "drop_condition"):
        check_real(name, getattr(config, name), owner=OWNER)
        if getattr(config, name) < 0:
            raise ConfigError(f"{name} {getattr(config, name)} of a fine-tune is not >= 0")
    if config.drop_condition > 1:
        raise ConfigError(f"drop_condition {config.drop_condition} is not a share, in [0, 1]")
    for name in POSITIVE:
        check_positive(config, name)


def check_positive(config: Any, name: str) -> bool:
    """Returns whether an option is on, not None. Raises ConfigError for no finite number > 0."""
    value = getattr(config, name)
    if value is None:
        return False
    check_real(name, value, owner=OWNER)
    if value <= 0:
        raise ConfigError(f"{name} {value} is not > 0; None switches it off")
    return True


def check_decays(config: Any) -> None:
    """Raises ConfigError where the decay of the EMA, or a beta of AdamW, is not in [0, 1)."""
    if config.ema_decay is not None:
        check_real("ema_decay", config.ema_decay, owner=OWNER)
        if not 0 <= config.ema_decay < 1:
            raise ConfigError(
                f"ema_decay {config.ema_decay} is not in [0, 1); None keeps no average"
            )
    betas = config.betas
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ConfigError(f"betas {betas!r} of a fine-tune are not two numbers, e.g. [0.9, 0.999]")
    for beta in betas:
        check_real("betas:", beta, owner=OWNER)
        if not 0 <= beta < 1:
            raise ConfigError(f"betas {list(betas)} of a fine-tune are not in [0, 1)")


def make_counts_whole(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the counts among ``options`` that are whole but floats, as 1e5 is in YAML.

    >>> make_counts_whole({"images": 1e3, "keep": 2, "lr": 1.0})
    {'images': 1000}
    """
    return {
        name: int(value)
        for name, value in options.items()
        if name in COUNTS and isinstance(value, float) and value.is_integer()
    }


def check_inputs(config: Any, inputs: Any) -> None:
    """Raises ConfigError for sample grids that are to be drawn, and not said how."""
    if config.sample_every is not None and inputs.sample_grids is None:
        raise ConfigError(f"sample_every {config.sample_every} does nothing without sample_grids")


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
    if config.stages and not config.staged:
        raise ConfigError(f"stages {list(config.stages)} are for a staged run: staged=True")
    if config.teacher == "previous" and not config.staged:
        raise ConfigError("teacher 'previous' is the student of the stage before: staged=True")
    if config.teacher_cache is not None and (config.teacher != "given" or config.beta == 0):
        raise ConfigError(
            f"teacher_cache keeps the outputs of a dense teacher: it needs teacher 'given' and "
            f"beta > 0, not teacher {config.teacher!r} and beta {config.beta:g}"
        )
    if config.only == "lora" and (config.shard or config.static_mask or not config.sparse):
        raise ConfigError("only='lora' is for methods with masks, not for static_mask or shard")
