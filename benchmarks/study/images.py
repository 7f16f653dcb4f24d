"""The images of a study where its models are: read when they are needed, or on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from sparsedm_compiler.data import ImageData, open_data

from .plan import Study


@dataclass(frozen=True, slots=True)
class Images:
    """Images to train on, and those that held-out losses are measured on."""

    train: ImageData | Tensor
    held_out: ImageData | Tensor


def open_images(study: Study) -> Images:
    """Returns the images; of a study with a recipe all of them, decoded, on its device."""
    if study.recipe is None:
        return Images(study.open_training_data(), study.open_held_out())
    held_out = fetch_all(study.held_out, study.size, study.budget.held_out, study.device)
    return Images(fetch_all(study.data, study.size, None, study.device), held_out)


@cache
def fetch_all(spec: str, size: int | None, limit: int | None, device: str) -> Tensor:
    """Returns all images [n, C, H, W] of a source on the device, read once in a process."""
    data = open_data(spec, size=size, limit=limit, labels=False)
    return data.fetch(range(len(data)))[0].to(device)
