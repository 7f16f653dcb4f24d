"""scikit-learn's handwritten digits, which come with the package and need no download."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .image_data import ReadOptions, require
from .tensors import TensorData, from_arrays

HELD_OUT = 360


def open_digits(split: str, options: ReadOptions) -> TensorData:
    """Returns the 1797 digits [1, 8, 8] in one fixed split: 1437 in "train", 360 in "test".

    Raises DataError for another split, ConfigError without scikit-learn.
    """
    splits = ("train", "test")
    if split not in splits:
        raise DataError(f"digits has no split {split!r}; give 'digits' (train) or 'digits:test'")
    digits = require("sklearn.datasets", "scikit-learn").load_digits()
    divide = require("sklearn.model_selection", "scikit-learn").train_test_split
    parts = divide(
        digits.images, digits.target, test_size=HELD_OUT, stratify=digits.target, random_state=0
    )
    part = splits.index(split)
    images = parts[part].astype(np.float32) / 8 - 1  # 17 levels, 0..16
    return from_arrays(images, parts[2 + part], options, f"digits:{split}")
