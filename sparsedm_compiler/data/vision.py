"""Datasets of torchvision that are on disk already; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..optional_deps import mend_torchvision
from .decoded import FileData
from .image_data import ImageData, Wanted, require
from .tensors import from_arrays

LABELS = {
    "CIFAR10": "targets",
    "CIFAR100": "targets",
    "FashionMNIST": "targets",
    "KMNIST": "targets",
    "MNIST": "targets",
    "STL10": "labels",
    "SVHN": "labels",
    "USPS": "targets",
}
"""Where each dataset that is read into memory keeps its labels; its images are ``data``."""
NAMED_SPLITS = ("CelebA", "STL10", "SVHN")
"""Those that take split="train"; the others take train=True."""


def open_torchvision(name: str, root: Path, split: str | None, wanted: Wanted) -> ImageData:
    """The dataset ``name`` of torchvision below ``root``: its train split, unless one is named.

    CelebA is decoded when it is fetched and has no classes, the others are in memory.
    Raises DataError for a name not known here or files not there, ConfigError without torchvision.
    """
    if name not in LABELS and name != "CelebA":
        raise DataError(
            f"torchvision dataset {name!r} is not among {', '.join(sorted([*LABELS, 'CelebA']))}; "
            "one that is kept as image files opens as a folder: give its path"
        )
    found = built(name, root, split or "train")
    if name == "CelebA":
        folder = root / found.base_folder / "img_align_celeba"
        return FileData([folder / file for file in found.filename], None, wanted)
    where = f"torchvision:{name}:{root}"
    labels = np.asarray(getattr(found, LABELS[name]))
    return from_arrays(np.asarray(found.data), labels, wanted, where)


def built(name: str, root: Path, split: str) -> Any:
    """The torchvision dataset itself."""
    mend_torchvision()
    kind = getattr(require("torchvision.datasets", "torchvision"), name)
    if name in NAMED_SPLITS:
        options: dict[str, Any] = {"split": split}
    elif split in ("train", "test"):
        options = {"train": split == "train"}
    else:
        raise DataError(f"torchvision's {name} has the splits train and test, no {split!r}")
    try:
        return kind(str(root), download=False, **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"cannot open torchvision's {name} in {root}: {error} - for example by "
            f"torchvision.datasets.{name}(root, download=True) on a machine with a network"
        ) from error
