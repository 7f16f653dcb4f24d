"""npz archives: arrays of images and labels, in named splits or alone, or packs of JPEGs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..npz_archive import open_archive
from .image_data import ImageData, ReadOptions
from .jpeg_pack import PACK, PackData
from .tensors import from_arrays

IMAGES = ("x", "images", "arr_0")
LABELS = ("y", "labels", "arr_1")
"""By falling preference; arr_0 and arr_1 are what np.savez calls arrays without a name."""


def open_npz(path: Path, split: str | None, options: ReadOptions) -> ImageData:
    """Returns the images of an archive, read into memory.

    It holds "images" (or "x") as ``pixels.pixels_from_array`` takes them and "labels" (or "y") [n];
    or those of several splits, "train_images", "test_labels" ..., one of which ``split`` selects
    (None: train); or "header", "body", "offsets", "labels": a pack of JPEGs.
    Pickled arrays are not read. Raises DataError where it holds none of these.
    """
    with open_archive(path) as arrays:
        if set(arrays) >= PACK:
            if split is not None:
                raise DataError(f"{path} is a JPEG pack, which has no splits such as {split!r}")
            return PackData(path, dict(arrays), options)
        image, label = choose_arrays([*arrays], split, path)
        labels = arrays[label] if label is not None and options.labels else None
        return from_arrays(arrays[image], labels, options, f"{path}, {image}")


def choose_arrays(names: Sequence[str], split: str | None, path: Path) -> tuple[str, str | None]:
    """Returns the names of the arrays of images and, if there are any, of labels.

    Raises DataError where there are no images (of that split).
    """
    for prefix in ("", "train_") if split is None else (f"{split}_",):
        images = [prefix + name for name in IMAGES if prefix + name in names]
        labels = [prefix + name for name in LABELS if prefix + name in names]
        if images:
            return images[0], labels[0] if labels else None
    missing = "images" if split is None else f"images of a split {split!r}"
    raise DataError(
        f"{path} holds {', '.join(names) or 'nothing'}, no {missing}: they are called 'images' or "
        "'x', those of a split 'test_images' or 'test_x', opened as 'FILE.npz:test'"
    )
