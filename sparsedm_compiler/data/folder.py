"""A folder of image files, whose sub-folders are the classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from ..errors import DataError
from .decoded_data import FileData
from .image_data import ReadOptions

WITHOUT_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows and cannot decode by itself."""
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def open_folder(root: Path, options: ReadOptions) -> FileData:
    """Returns the images below ``root``, at any depth, in the order of their paths.

    The classes are the sub-folders of ``root`` in alphabetical order. Raises DataError where there
    is no image, where some lie in sub-folders and others beside them, or where the sub-folders are
    splits.
    """
    paths, others = list_image_files(root)
    if not paths:
        content = f", only{describe_others(others)}" if others else " and no other files"
        raise DataError(
            f"{root} holds no images{content}; a dataset that the package datasets saved there "
            "opens as 'hf:PATH'"
        )
    tops = [path.relative_to(root).parts[0] for path in paths]
    names = sorted(set(tops))
    if {name.lower() for name in names} <= SPLITS:
        raise DataError(
            f"{root} holds the splits {', '.join(names)}; open one of them: {root / names[0]}"
        )
    labels = None
    if options.labels and has_classes(root, paths):
        class_numbers = {name: number for number, name in enumerate(names)}
        labels = torch.tensor([class_numbers[name] for name in tops], device="cpu")
    data = FileData(paths, labels, options)
    if others:
        data.notes = (f"left out{describe_others(others)}",)
    return data


def has_classes(root: Path, paths: Sequence[Path]) -> bool:
    """Returns whether all images lie in sub-folders of ``root``.

    Raises DataError where some do and some do not.
    """
    loose = [path.name for path in paths if path.parent == root]
    if 0 < len(loose) < len(paths):
        raise DataError(
            f"{root} holds {len(paths) - len(loose):,} images in sub-folders, which are classes, "
            f"and {len(loose):,} beside them ({loose[0]} ...): move those into a class, or use no "
            "labels (data.labels=false; in Python labels=False)"
        )
    return not loose


def describe_others(others: Sequence[Path]) -> str:
    """Returns how many files of which kinds are no images, "" for none."""
    if not others:
        return ""
    kinds = Counter(path.suffix.lower() or "no suffix" for path in others)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    files = "file" if len(others) == 1 else "files"
    return f" {len(others):,} {files} of kinds that Pillow does not open ({listed})"


def list_image_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Lists every file below ``root`` that Pillow opens by its suffix, and every other one.

    Both are in the order of their paths, without hidden files. Raises DataError for a folder that
    cannot be listed.
    """
    suffixes = list_suffixes()
    images: list[Path] = []
    others: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                known = os.path.splitext(name)[1].lower() in suffixes
                (images if known else others).append(Path(folder, name))
    for paths in (images, others):
        paths.sort(key=lambda path: path.parts)
    return images, others


@cache
def list_suffixes() -> frozenset[str]:
    """Returns the suffixes of all formats that Pillow decodes, e.g. ".png"."""
    formats = Image.registered_extensions()  # which loads all of Pillow's formats
    return frozenset(
        suffix
        for suffix, name in formats.items()
        if name in Image.OPEN and name not in WITHOUT_PIXELS
    )


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot list {error.filename}: {error.strerror}") from error
