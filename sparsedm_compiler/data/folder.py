"""A folder of image files; where each lies in a sub-folder, that is its class."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import DataError
from .decoded import FileData
from .image_data import Wanted

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def open_folder(root: Path, wanted: Wanted) -> FileData:
    """The images below ``root``, at any depth, in the order of their paths.

    The classes are the sub-folders of ``root`` in alphabetical order, if no image lies outside of
    them. Raises DataError where there is no image, or where the sub-folders are splits.
    """
    paths = image_files(root)
    if not paths:
        raise DataError(
            f"{root} holds no images ({' '.join(SUFFIXES)}); a dataset that the package datasets "
            "saved there opens as 'hf:PATH'"
        )
    tops = [path.relative_to(root).parts[0] for path in paths]
    names = sorted(set(tops))
    if {name.lower() for name in names} <= SPLITS:
        raise DataError(
            f"{root} holds the splits {', '.join(names)}; open one of them: {root / names[0]}"
        )
    labels = None
    if wanted.labels and all(path.parent != root for path in paths):
        number = {name: place for place, name in enumerate(names)}
        labels = torch.tensor([number[top] for top in tops])
    return FileData(paths, labels, wanted)


def image_files(root: Path) -> list[Path]:
    """Every image file below ``root`` in the order of their paths, hidden ones left out."""
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.parts)


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot list {error.filename}: {error.strerror}") from error
