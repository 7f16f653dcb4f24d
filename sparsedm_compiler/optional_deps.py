"""``import_diffusers``: the optional dependency, or a sentence that says how to get it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from .errors import ConfigError

MISSING_OPS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""Ops a torchvision built for another torch fails to load and yet insists on at import."""


def import_diffusers() -> ModuleType:
    """The diffusers package. Raises ConfigError where it is not installed."""
    if find_spec("diffusers") is None:
        raise ConfigError(
            "this model comes from diffusers, which is not installed: "
            'pip install "sparsedm-compiler[diffusers]"'
        )
    mend_torchvision()
    return import_module("diffusers")


def mend_torchvision() -> bool:
    """Whether torchvision, if it is installed, needed its missing ops declared to be imported.

    PyPI's torchvision is built for the CUDA torch; beside a CPU torch it raises RuntimeError at
    import, and transformers, peft and diffusers, which only ask whether it is installed, with it.
    Declaring the two ops is enough for all that does not call them. A sound torchvision, or none,
    is left alone.
    """
    if find_spec("torchvision") is None:
        return False
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name, schema in MISSING_OPS.items():
            torch.library.define(f"torchvision::{name}", schema)
        import_module("torchvision")
        return True
    return False
