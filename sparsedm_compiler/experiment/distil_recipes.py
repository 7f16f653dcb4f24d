"""Recipes to distil a big model into its sparse self, beside those of the paper.

All imitate the dense model more than the data (beta 1), without SR-STE, in bfloat16. "less-memory"
and "adapters" go on top: "sdxl+less-memory", "flux1+adapters".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DISTIL: Mapping[str, Any] = {
    "method": "sparsedm",
    "sr_ste_lambda": 0.0,
    "beta": 1.0,
    "lr": 1e-5,
    "betas": [0.9, 0.999],
    "weight_decay": 0.01,
    "schedule": "cosine",
    "ema_decay": 0.9999,
    "max_grad_norm": 1.0,
    "mixed_precision": "bf16",
    "teacher_dtype": "bf16",
}


def _count(steps: int, batch: int, parts: int) -> dict[str, int]:
    """Returns the images of so many steps, a twentieth of them to warm up, in parts of a batch."""
    images = steps * batch
    sizes = {"batch_size": batch, "accumulation": parts}
    return {"images": images, **sizes, "warmup_images": images // 20}


_FLOW: Mapping[str, Any] = {"objective": "flow", "levels": "logit-normal"}

DISTIL_RECIPES: Mapping[str, Mapping[str, Any]] = {
    "less-memory": {
        "train": {"gradient_checkpointing": True, "optimizer": "bnb-paged-adamw8bit"},
    },
    "adapters": {
        "train": {"only": "lora", "lora_rank": 64, "lr": 1e-4, "ema_decay": None},
    },
    "sd15": {
        "model": {"name": "sd15"},
        "train": {
            **_DISTIL,
            **_count(10_000, 256, 16),
            "drop_condition": 0.1,
        },
        "sample": {"sampler": "dpm++", "steps": 25, "guidance": 7.5, "grid": 8},
    },
    "sdxl": {
        "model": {"name": "sdxl"},
        "train": {
            **_DISTIL,
            **_count(10_000, 128, 64),
            "drop_condition": 0.1,
            "gradient_checkpointing": True,
        },
        "sample": {"sampler": "dpm++", "steps": 25, "guidance": 5.0, "grid": 4},
    },
    "dit-xl-2": {
        "model": {"name": "dit-xl-2"},
        "train": {
            **_DISTIL,
            **_count(10_000, 256, 8),
            "drop_condition": 0.1,
            "null_label": 1000,
        },
        "sample": {"sampler": "ddim", "steps": 50, "guidance": 1.5},
    },
    "sd3-medium": {
        "model": {"name": "sd3-medium"},
        "train": {
            **_DISTIL,
            **_FLOW,
            **_count(10_000, 128, 64),
            "drop_condition": 0.1,
            "gradient_checkpointing": True,
        },
        "sample": {"sampler": "euler", "steps": 28, "guidance": 7.0, "grid": 4},
    },
    "flux1": {
        "model": {"name": "flux1"},
        "train": {
            **_DISTIL,
            **_FLOW,
            **_count(5_000, 64, 64),
            "gradient_checkpointing": True,
        },
        "sample": {"sampler": "euler", "steps": 28, "grid": 4},
    },
}
"""The recipes by name; ``RECIPES`` holds them, too."""
