"""A folder of image files, whose sub-folders are the classes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import DataError
from .decoded_data import FileData
from .image_data import ReadOptions

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def open_folder(root: Path, options: ReadOptions) -> FileData:
    """Returns the images below ``root``, at any depth, in the order of their paths.

    The classes are the sub-folders of ``root`` in alphabetical order, if no image lies outside of
    them. Raises DataError where there is no image, or where the sub-folders are splits.
    """
    paths = list_image_files(root)
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
    if options.labels and all(path.parent != root for path in paths):
        class_numbers = {name: number for number, name in enumerate(names)}
        labels = torch.tensor([class_numbers[name] for name in tops])
    return FileData(paths, labels, options)


def list_image_files(root: Path) -> list[Path]:
    """Lists every image file below ``root`` in the order of their paths, without hidden ones.

    Raises DataError for a folder that cannot be listed.
    """
    paths = []
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            Path(folder, name)
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(paths, key=lambda path: path.parts)


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot list {error.filename}: {error.strerror}") from error
