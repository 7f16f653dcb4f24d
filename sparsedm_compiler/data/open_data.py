"""Any source of images from one line of text."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import DataError
from .digits import open_digits
from .folder import open_folder
from .hub import open_hub
from .image_data import ImageData, ReadOptions
from .latents import LatentData
from .npz import open_npz
from .vision import open_torchvision

FORMS = (
    "digits[:test] (scikit-learn's)",
    "a folder of images",
    "FILE.npz[:SPLIT]",
    "FILE.safetensors (latents)",
    "hf:FOLDER[:SPLIT] (datasets' save_to_disk)",
    "torchvision:NAME:FOLDER[:SPLIT]",
)


def open_data(
    spec: str | os.PathLike[str],
    *,
    size: int | None = None,
    labels: bool = True,
    limit: int | None = None,
) -> ImageData:
    """Opens a source of images described by one line of text.

    - ``digits``, ``digits:test``: scikit-learn's digits, 1437 and 360 images [1, 8, 8];
    - ``FOLDER``: files that Pillow opens (png, jpg, webp, bmp, tiff, gif ...) at any depth, as RGB,
      upright, on white, of an animation its first frame; the sub-folders of FOLDER, if there are
      any, are the classes;
    - ``FILE.npz``, ``FILE.npz:SPLIT``: arrays "images" (or "x") and "labels" (or "y"), with
      "train_", "test_" ... before them where there are splits; or a pack of JPEGs;
    - ``FILE.safetensors``: latents, as ``encode_latents`` writes them;
    - ``hf:FOLDER``, ``hf:FOLDER:SPLIT``: a dataset that ``datasets`` saved by ``save_to_disk``, as
      RGB;
    - ``torchvision:NAME:FOLDER``, ``torchvision:NAME:FOLDER:SPLIT``: its CIFAR10, MNIST ...

    Args:
        spec: One of the forms above. A source of several splits opens "train" by default.
        size: Side in pixels to which the middle square of every image is resized, by averaging
            where it divides evenly, else by Lanczos; smaller images are enlarged. None leaves all
            as they are, and they must be of one size.
        labels: False leaves labels and any other condition out.
        limit: Number of images to keep, the first ones (of a folder: those of its first classes);
            None keeps all.

    Returns:
        The images by number, with their labels or other condition.

    Raises:
        DataError: The source cannot be read, or an option is not positive.
        ConfigError: A package that the source needs is not installed.

    Example:
        >>> data = open_data("digits:test", limit=3)
        >>> len(data), data.shape, data.classes
        (3, (1, 8, 8), 10)
        >>> data.fetch([0, 2])[1]
        tensor([7, 3])
    """
    text = os.fspath(spec)
    options = ReadOptions(size, labels, limit)
    kind, _, rest = text.partition(":")
    if kind == "digits":
        return open_digits(rest or "train", options)
    if kind == "hf":
        return open_hub(*split_folder(rest), options)
    if kind == "torchvision":
        name, _, folder = rest.partition(":")
        root, split = split_folder(folder)
        return open_torchvision(name, root, split, options)
    if archive := re.fullmatch(r"(.+\.npz)(?::(\w+))?", text):
        return open_npz(Path(archive[1]).expanduser(), archive[2], options)
    path = Path(text).expanduser()
    if path.suffix == ".safetensors":
        return LatentData(path, options)
    if text and path.is_dir():
        return open_folder(path, options)
    problem = "is a file of no known kind" if path.is_file() else "does not exist"
    raise DataError(f"{text!r} {problem}; data are given as {', '.join(FORMS)}")


def split_folder(text: str) -> tuple[Path, str | None]:
    """Splits ``FOLDER:SPLIT`` into path and split; a folder may have a colon in its name.

    The split is None for ``FOLDER`` alone.
    """
    whole = Path(text).expanduser()
    front, colon, split = text.rpartition(":")
    if colon and not whole.exists() and Path(front).expanduser().exists():
        return Path(front).expanduser(), split
    return whole, None
