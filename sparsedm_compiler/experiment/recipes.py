"""``RECIPES``: the settings that the paper trained its models with, to start from.

SparseDM trains with the settings of the dense models: U-ViT's own (Bao et al. 2023, its published
configurations) and DDPM's (Ho et al. 2020). Steps and warm-ups are given in images. They are for
long training. "short" is for fine-tunes of a few epochs, in which SR-STE's term costs more than it
gives (docs/results/methods.md); "cifar10-uvit+short" puts it on top of another. "short-gpu" is for
minutes on one GPU, at the learning rate of a dense model that was trained in minutes as well.

The recipes of ``distil_recipes`` are for models that the paper does not train. Theirs are settings
to start from, which nobody has run at full size here.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from .. import ConfigError
from .distil_recipes import DISTIL_RECIPES
from .yaml_values import merge

_ADAMW: Mapping[str, Any] = {
    "lr": 2e-4,
    "weight_decay": 0.03,
    "schedule": "constant",
    "ema_decay": 0.9999,
}
_FLAT: Mapping[str, Any] = {"policy": "uvit"}

_SHORT: Mapping[str, Any] = {
    "sr_ste_lambda": 0.0,
    "beta": 1.0,
    "schedule": "cosine",
    "warmup_images": 0,
}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "short": {"train": _SHORT},
    "short-gpu": {
        "train": {
            **_SHORT,
            "images": 50_000,
            "batch_size": 128,
            "lr": 5e-4,
            "betas": [0.9, 0.99],
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "ema_decay": 0.99,
            "mixed_precision": "bf16",
        },
        "sample": {"steps": 20},
        "score": {"count": 2000},
    },
    "cifar10-uvit": {
        "model": {"name": "uvit-cifar10-small"},
        "data": {"size": 32, "labels": False},
        "prune": _FLAT,
        "train": {
            **_ADAMW,
            "images": 500_000 * 128,
            "batch_size": 128,
            "betas": [0.99, 0.999],
            "warmup_images": 2500 * 128,
            "flip": True,
        },
        "sample": {"sampler": "dpm++", "steps": 50},
        "score": {"count": 50_000},
    },
    "celeba64-uvit": {
        "model": {"name": "uvit-celeba64-small"},
        "data": {"size": 64, "labels": False},
        "prune": _FLAT,
        "train": {
            **_ADAMW,
            "images": 500_000 * 128,
            "batch_size": 128,
            "betas": [0.99, 0.99],
            "warmup_images": 5000 * 128,
            "flip": True,
        },
        "sample": {"sampler": "dpm++", "steps": 50},
        "score": {"count": 50_000},
    },
    "imagenet256-uvit": {
        "model": {"name": "uvit-imagenet256-large"},
        "prune": _FLAT,
        "train": {
            **_ADAMW,
            "images": 300_000 * 1024,
            "batch_size": 1024,
            "betas": [0.99, 0.99],
            "warmup_images": 5000 * 1024,
            "drop_condition": 0.15,
            "null_label": 1000,
            "mixed_precision": "bf16",
        },
        "sample": {"sampler": "dpm++", "steps": 50, "guidance": 1.4},
        "score": {"count": 50_000},
    },
    "mscoco-uvit": {
        "model": {"name": "uvit-mscoco-small"},
        "prune": _FLAT,
        "train": {
            **_ADAMW,
            "images": 1_000_000 * 256,
            "batch_size": 256,
            "betas": [0.9, 0.9],
            "warmup_images": 5000 * 256,
            "drop_condition": 0.1,
            "mixed_precision": "bf16",
        },
        "sample": {"sampler": "dpm++", "steps": 50, "guidance": 2.0},
        "score": {"count": 30_000},
    },
    "cifar10-ddpm": {
        "model": {"name": "ddpm-cifar10"},
        "data": {"size": 32, "labels": False},
        "prune": {"policy": "all"},
        "train": {
            **_ADAMW,
            "images": 800_000 * 128,
            "batch_size": 128,
            "weight_decay": 0.0,
            "betas": [0.9, 0.999],
            "warmup_images": 5000 * 128,
            "max_grad_norm": 1.0,
            "flip": True,
        },
        "sample": {"sampler": "ddpm", "steps": 1000},
        "score": {"count": 50_000},
    },
    **DISTIL_RECIPES,
}
"""Every value of a configuration's ``recipe``. U-ViT's guidance s is ``guidance`` 1 + s here."""


def find_recipe(name: str | None) -> Mapping[str, Any]:
    """Returns the recipe of that name, or several joined by "+", the last on top; {} for None.

    Raises ConfigError for an unknown name.
    """
    values: dict[str, Any] = {}
    for part in [] if name is None else str(name).split("+"):
        if part not in RECIPES:
            close = get_close_matches(part, RECIPES, n=3) or [*RECIPES]
            raise ConfigError(f"there is no recipe {part!r}; there is {' and '.join(close)}")
        values = merge(values, RECIPES[part])
    return values
