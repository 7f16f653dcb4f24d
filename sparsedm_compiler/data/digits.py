"""scikit-learn's handwritten digits, which come with the package and need no download."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .image_data import Wanted, require
from .tensors import TensorData, from_arrays

HELD_OUT = 360


def open_digits(split: str, wanted: Wanted) -> TensorData:
    """The 1797 digits [1, 8, 8] in one fixed split: 1437 in "train", 360 in "test".

    Raises DataError for another split, ConfigError without scikit-learn.
    """
    splits = ("train", "test")
    if split not in splits:
        raise DataError(f"digits has no split {split!r}; give 'digits' (train) or 'digits:test'")
    found = require("sklearn.datasets", "scikit-learn").load_digits()
    divide = require("sklearn.model_selection", "scikit-learn").train_test_split
    parts = divide(
        found.images, found.target, test_size=HELD_OUT, stratify=found.target, random_state=0
    )
    part = splits.index(split)
    images = parts[part].astype(np.float32) / 8 - 1  # 17 levels, 0..16
    return from_arrays(images, parts[2 + part], wanted, f"digits:{split}")
