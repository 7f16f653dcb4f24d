"""Datasets of torchvision that are on disk already; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..optional_deps import mend_torchvision
from .decoded_data import FileData
from .image_data import ImageData, ReadOptions, require
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
"""The attribute with the labels of every dataset that is read into memory; images are ``data``."""
NAMED_SPLITS = ("CelebA", "STL10", "SVHN")
"""Datasets that take split="train"; the others take train=True."""


def open_torchvision(name: str, root: Path, split: str | None, options: ReadOptions) -> ImageData:
    """Returns the dataset ``name`` of torchvision below ``root``, by default its train split.

    CelebA is decoded when it is fetched and has no classes, the others are in memory.
    Raises DataError for an unknown name or missing files, ConfigError without torchvision.
    """
    if name not in LABELS and name != "CelebA":
        raise DataError(
            f"torchvision dataset {name!r} is not among {', '.join(sorted([*LABELS, 'CelebA']))}; "
            "one that is kept as image files opens as a folder: give its path"
        )
    dataset = load_dataset(name, root, split or "train")
    if name == "CelebA":
        folder = root / dataset.base_folder / "img_align_celeba"
        return FileData([folder / file for file in dataset.filename], None, options)
    labels = np.asarray(getattr(dataset, LABELS[name]))
    return from_arrays(np.asarray(dataset.data), labels, options, f"torchvision:{name}:{root}")


def load_dataset(name: str, root: Path, split: str) -> Any:
    """Returns the torchvision dataset itself.

    Raises DataError for missing files or an unknown split, ConfigError without torchvision.
    """
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
