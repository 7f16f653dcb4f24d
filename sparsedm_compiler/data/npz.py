"""npz archives: arrays of images and labels, in named splits or alone, or packs of JPEGs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..errors import DataError
from .image_data import ImageData, Wanted
from .jpeg_pack import PACK, PackData
from .tensors import from_arrays

IMAGES = ("x", "images", "arr_0")
LABELS = ("y", "labels", "arr_1")
"""By falling preference; arr_0 and arr_1 are what np.savez calls arrays without a name."""


def open_npz(path: Path, split: str | None, wanted: Wanted) -> ImageData:
    """The images of an archive, read into memory.

    It holds "images" (or "x") as ``pixels.pixels_of`` takes them and "labels" (or "y") [n]; or
    those of several splits, "train_images", "test_labels" ..., of which ``split`` names one and
    None is train; or "header", "body", "offsets", "labels": a pack of JPEGs.
    Pickled arrays are not read. Raises DataError where it holds none of these.
    """
    with archive(path) as arrays:
        if set(arrays.files) >= PACK:
            if split is not None:
                raise DataError(f"{path} is a JPEG pack, which has no splits such as {split!r}")
            return PackData(path, dict(arrays), wanted)
        image, label = chosen(arrays.files, split, path)
        labels = arrays[label] if label is not None and wanted.labels else None
        return from_arrays(arrays[image], labels, wanted, f"{path}, {image}")


@contextmanager
def archive(path: Path) -> Iterator[Any]:
    """The archive at ``path`` while the block runs. Raises DataError where it cannot be read."""
    try:
        with path.open("rb") as file:  # numpy itself leaves a damaged file open
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ValueError("it is one array, not an archive; use np.savez(path, x=array)")
            yield found
    except DataError:
        raise
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path} as an npz without pickles: {error}") from error


def chosen(names: Sequence[str], split: str | None, path: Path) -> tuple[str, str | None]:
    """The names of the arrays that hold the images and, if any, the labels."""
    for prefix in ("", "train_") if split is None else (f"{split}_",):
        images = [prefix + name for name in IMAGES if prefix + name in names]
        labels = [prefix + name for name in LABELS if prefix + name in names]
        if images:
            return images[0], labels[0] if labels else None
    asked = "images" if split is None else f"images of a split {split!r}"
    raise DataError(
        f"{path} holds {', '.join(names) or 'nothing'}, no {asked}: they are called 'images' or "
        "'x', those of a split 'test_images' or 'test_x', opened as 'FILE.npz:test'"
    )
