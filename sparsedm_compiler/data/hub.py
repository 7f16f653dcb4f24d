"""Datasets of the package datasets (Hugging Face), as ``save_to_disk`` left them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..diffusion.condition import Condition
from ..errors import DataError
from .decoded import DecodedData, Encoded
from .image_data import EVERYTHING, Wanted, checked_labels, require

LABEL_NAMES = ("label", "labels", "class", "y")
"""Which column of integers is the class where no column is declared to be one."""


class HubData(DecodedData):
    """The images of a ``datasets.Dataset``, decoded when they are fetched.

    The images are the one column of feature type Image. The labels are the column ``label``; by
    itself the ClassLabel column, or integers under one of LABEL_NAMES. ``conditions``: keyword of
    the model's forward -> column of embeddings, each of one shape; they take the labels' place.
    Raises DataError where there is no such column, or more than one.
    """

    def __init__(
        self,
        rows: Any,
        *,
        wanted: Wanted = EVERYTHING,
        label: str | None = None,
        conditions: Mapping[str, str] | None = None,
        where: str = "the dataset",
    ) -> None:
        features = require("datasets", "datasets").Image(decode=False)
        self.where = where
        self.columns = dict(conditions or {})
        for column in (*self.columns.values(), *([label] if label else [])):
            if column not in rows.column_names:
                raise DataError(f"{where} has no column {column!r}, but {described(rows)}")
        if not len(rows):
            raise DataError(f"{where} holds no images")
        self.image = image_column(rows, where)
        self.pictures = (
            rows.with_format(None).select_columns([self.image]).cast_column(self.image, features)
        )
        self.embeddings = rows.with_format("torch", columns=[*self.columns.values()])
        labels, classes = None, None
        if wanted.labels and not self.columns:
            labels, classes = labels_of(rows, label or label_column(rows, where), where)
        super().__init__(len(rows), labels, wanted)
        self.classes = classes

    def encoded(self, numbers: Sequence[int]) -> Sequence[Encoded]:
        return [
            self._encoded(number, cell)
            for number, cell in zip(numbers, self.pictures[list(numbers)][self.image], strict=True)
        ]

    def _encoded(self, number: int, cell: Mapping[str, Any] | None) -> Encoded:
        name = f"row {number} of {self.where}"
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"{name} has no image; take it out")
        return name, Path(cell["path"]) if cell["bytes"] is None else BytesIO(cell["bytes"])

    def condition(self, index: Tensor) -> Condition | None:
        if not self.columns:
            return super().condition(index)
        found = self.embeddings[index.tolist()]
        for column in self.columns.values():
            if not isinstance(found[column], Tensor):
                raise DataError(
                    f"{self.where}: the rows of {column!r} differ in shape; pad them to one"
                )
        return {name: found[column] for name, column in self.columns.items()}


def open_hub(path: Path, split: str | None, wanted: Wanted) -> HubData:
    """The dataset saved at ``path``; of several splits the one named, else train.

    Raises DataError where there is none, or not that split; ConfigError without datasets.
    """
    datasets = require("datasets", "datasets")
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; write one by dataset.save_to_disk(path)")
    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read {path} as a dataset: {error}; write it by dataset.save_to_disk(path)"
        ) from error
    if isinstance(rows, datasets.DatasetDict):
        name = split or (next(iter(rows)) if len(rows) == 1 else "train")
        if name not in rows:
            raise DataError(f"{path} has the splits {', '.join(rows)}, no {name!r}")
        rows = rows[name]
    elif split is not None:
        raise DataError(f"{path} is a single dataset without splits such as {split!r}")
    return HubData(rows, wanted=wanted, where=str(path))


def image_column(rows: Any, where: str) -> str:
    """The one column of images."""
    kind = require("datasets", "datasets").Image
    found: list[str] = [
        name for name, feature in rows.features.items() if isinstance(feature, kind)
    ]
    if len(found) != 1:
        raise DataError(
            f"{where} has {len(found)} columns of type Image, not one, among {described(rows)}; "
            "use cast_column(name, datasets.Image()) or remove_columns"
        )
    return found[0]


def label_column(rows: Any, where: str) -> str | None:
    """The column of classes, None where there is none."""
    datasets = require("datasets", "datasets")
    kinds = rows.features.items()
    found = [name for name, feature in kinds if isinstance(feature, datasets.ClassLabel)]
    if not found:
        found = [name for name, kind in kinds if name in LABEL_NAMES and _whole(kind)]
    if len(found) > 1:
        raise DataError(
            f"{where} has several columns of classes: {', '.join(found)}; remove_columns but one, "
            "or HubData(rows, label=...)"
        )
    return found[0] if found else None


def _whole(feature: Any) -> bool:
    """Whether a feature is a plain integer."""
    value = require("datasets", "datasets").Value
    return isinstance(feature, value) and feature.dtype.startswith(("int", "uint"))


def labels_of(rows: Any, column: str | None, where: str) -> tuple[Tensor | None, int | None]:
    """The labels [n] in ``column`` and how many classes there are."""
    if column is None:
        return None, None
    cells = rows.select_columns([column]).with_format("numpy")[:][column]
    labels = checked_labels(np.asarray(cells), len(rows), f"{where}, column {column!r}")
    feature = rows.features[column]
    declared = isinstance(feature, require("datasets", "datasets").ClassLabel)
    return labels, feature.num_classes if declared else int(labels.max()) + 1


def described(rows: Any) -> str:
    """The columns with their types, as errors list them."""
    return ", ".join(
        f"{name} ({type(feature).__name__})" for name, feature in rows.features.items()
    )
