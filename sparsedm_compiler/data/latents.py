"""``LatentData``: latents in safetensors, read from the disk row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..diffusion.condition import Condition
from ..errors import DataError
from .image_data import EVERYTHING, Batch, ImageData, Wanted, checked_labels, count_classes
from .rowfile import Rows, stored

Value = TypeVar("Value", int, float)

PREFIX = "condition."
"""Before the keyword of the model's forward, in the names of tensors that condition it."""
FLOATS = ("F64", "F32", "F16", "BF16")


class LatentData(ImageData):
    """The latents [n, C, h, w] of a safetensors file, read from the disk as they are fetched.

    "labels" [n] or "condition.NAME" [n, ...] are what they are conditioned on. Where there is a
    "std" [n, C, h, w], the latents are the means and are given out as such: no fetch draws.
    ``scaling_factor``, ``shift_factor``, ``vae``: how they were made, None where the file does
    not say. Raises DataError for a file that holds no such latents.
    """

    def __init__(self, path: Path, wanted: Wanted = EVERYTHING) -> None:
        self.path = path
        file, notes = stored(path)
        self.latents = check(file, wanted, path)
        total, *shape = self.latents.shape
        self.count = wanted.first(total)
        self.shape = tuple(shape)
        self.conditions = {
            name.removeprefix(PREFIX): rows
            for name, rows in file.items()
            if wanted.labels and name.startswith(PREFIX)
        }
        self.labels: Tensor | None = None
        if wanted.labels and "labels" in file:
            rows = file["labels"]
            self.labels = checked_labels(rows.at(torch.arange(rows.shape[0])), total, str(path))
        self.classes = None
        if self.labels is not None:
            self.classes = noted(notes, "classes", int, path) or count_classes(self.labels)
        self.scaling_factor = noted(notes, "scaling_factor", float, path)
        self.shift_factor = noted(notes, "shift_factor", float, path)
        self.vae = notes.get("vae")

    def __len__(self) -> int:
        return self.count

    def fetch(self, numbers: Sequence[int]) -> Batch:
        index = self.index(numbers)
        latents = self.latents.at(index).float()
        if not latents.isfinite().all():
            bad = index[~latents.isfinite().flatten(1).all(1)][0]
            raise DataError(f"{self.path}: latents of image {int(bad)} hold NaN or Inf")
        return latents, self._condition(index)

    def _condition(self, index: Tensor) -> Condition | None:
        if self.labels is not None:
            return self.labels[index]
        found = {name: rows.at(index) for name, rows in self.conditions.items()}
        return {
            name: rows.float() if rows.is_floating_point() else rows for name, rows in found.items()
        } or None


def check(file: Mapping[str, Rows], wanted: Wanted, path: Path) -> Rows:
    """The latents. Raises DataError where the tensors do not fit one another."""
    if "latents" not in file:
        raise DataError(
            f"{path} holds {', '.join(file) or 'nothing'}, no 'latents': weights of a model? "
            "encode_latents writes such files"
        )
    latents = file["latents"]
    shape = latents.shape
    if len(shape) != 4 or not latents.readable or latents.kind not in FLOATS:
        raise DataError(
            f"{path}: latents {list(shape)} of type {latents.kind} are not floating-point "
            "[n, C, h, w]"
        )
    if wanted.size is not None and shape[2:] != (wanted.size, wanted.size):
        raise DataError(
            f"{path}: latents {list(shape)} cannot be resized to {wanted.size}; "
            "resize the images, then encode them"
        )
    if "std" in file and file["std"].shape != shape:
        raise DataError(f"{path}: std {list(file['std'].shape)} is not shaped like {list(shape)}")
    conditions = [name for name in file if name.startswith(PREFIX)]
    for name in (*conditions, *({"labels"} & file.keys())):
        if file[name].shape[:1] != shape[:1] or not file[name].readable:
            raise DataError(
                f"{path}: {name} {list(file[name].shape)} of type {file[name].kind} does not go "
                f"with {shape[0]} latents"
            )
    if wanted.labels and conditions and "labels" in file:
        raise DataError(
            f"{path} holds labels and {conditions[0]}: take one out, or write the labels as "
            f"'{PREFIX}KEYWORD' if the model takes both"
        )
    return latents


def noted(
    notes: Mapping[str, str], key: str, kind: Callable[[str], Value], path: Path
) -> Value | None:
    """The number that the metadata hold under ``key``, None where they hold none."""
    if key not in notes:
        return None
    try:
        return kind(notes[key])
    except ValueError as error:
        raise DataError(f"{path}: its metadata say {key} = {notes[key]!r}, no number") from error
