"""Datasets of the package datasets (Hugging Face) that ``save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..diffusion.condition import Condition
from ..errors import DataError
from .decoded_data import DecodedData, NamedFile
from .image_data import READ_ALL, ReadOptions, check_labels, require

LABEL_NAMES = ("label", "labels", "class", "y")
"""Names of a column of integers that is the class where no column is declared to be one."""


class HubData(DecodedData):
    """The images of a ``datasets.Dataset``, decoded when they are fetched.

    The images are the one column of feature type Image.

    Args:
        rows: The dataset, a single split.
        options: Size, labels and number of images; the default reads all of them as they are.
        label: Column of the labels. None is the ClassLabel column, or a column of integers called
            "label", "labels", "class" or "y", or no labels.
        conditions: Keyword of the model's forward -> column of embeddings, all of one shape. They
            take the place of the labels; None for none.
        where: Name of the data in error messages.

    Raises:
        DataError: There is no such column, or more than one, or a label is no class.
        ConfigError: The package datasets is not installed.
    """

    def __init__(
        self,
        rows: Any,
        *,
        options: ReadOptions = READ_ALL,
        label: str | None = None,
        conditions: Mapping[str, str] | None = None,
        where: str = "the dataset",
    ) -> None:
        features = require("datasets", "datasets").Image(decode=False)
        self.where = where
        self.columns = dict(conditions or {})
        for column in (*self.columns.values(), *([label] if label else [])):
            if column not in rows.column_names:
                raise DataError(f"{where} has no column {column!r}, but {describe_columns(rows)}")
        if not len(rows):
            raise DataError(f"{where} holds no images")
        self.image = find_image_column(rows, where)
        self.pictures = (
            rows.with_format(None).select_columns([self.image]).cast_column(self.image, features)
        )
        self.embeddings = rows.with_format("torch", columns=[*self.columns.values()])
        labels, classes = None, None
        if options.labels and not self.columns:
            label = label or find_label_column(rows, where)
            labels, classes = read_labels(rows, label, where)
        super().__init__(len(rows), labels, options)
        self.classes = classes

    def open_files(self, numbers: Sequence[int]) -> Sequence[NamedFile]:
        return [
            self._open_file(number, cell)
            for number, cell in zip(numbers, self.pictures[list(numbers)][self.image], strict=True)
        ]

    def _open_file(self, number: int, cell: Mapping[str, Any] | None) -> NamedFile:
        name = f"row {number} of {self.where}"
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"{name} has no image; take it out")
        return name, Path(cell["path"]) if cell["bytes"] is None else BytesIO(cell["bytes"])

    def take_condition(self, index: Tensor) -> Condition | None:
        if not self.columns:
            return super().take_condition(index)
        rows = self.embeddings[index.tolist()]
        for column in self.columns.values():
            if not isinstance(rows[column], Tensor):
                raise DataError(
                    f"{self.where}: the rows of {column!r} differ in shape; pad them to one"
                )
        return {name: rows[column] for name, column in self.columns.items()}


def open_hub(path: Path, split: str | None, options: ReadOptions) -> HubData:
    """Returns the dataset saved at ``path``; of several splits ``split``, by default train.

    Raises DataError where there is no dataset or no such split, ConfigError without datasets.
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
    return HubData(rows, options=options, where=str(path))


def find_image_column(rows: Any, where: str) -> str:
    """Returns the name of the one column of images.

    Raises DataError where there is none, or more than one.
    """
    kind = require("datasets", "datasets").Image
    columns: list[str] = [
        name for name, feature in rows.features.items() if isinstance(feature, kind)
    ]
    if len(columns) != 1:
        raise DataError(
            f"{where} has {len(columns)} columns of type Image, not one, among "
            f"{describe_columns(rows)}; use cast_column(name, datasets.Image()) or remove_columns"
        )
    return columns[0]


def find_label_column(rows: Any, where: str) -> str | None:
    """Returns the name of the column of classes, None where there is none.

    Raises DataError where there are several.
    """
    datasets = require("datasets", "datasets")
    kinds = rows.features.items()
    columns = [name for name, feature in kinds if isinstance(feature, datasets.ClassLabel)]
    if not columns:
        columns = [name for name, kind in kinds if name in LABEL_NAMES and _is_integer(kind)]
    if len(columns) > 1:
        raise DataError(
            f"{where} has several columns of classes: {', '.join(columns)}; remove_columns but "
            "one, or HubData(rows, label=...)"
        )
    return columns[0] if columns else None


def _is_integer(feature: Any) -> bool:
    value = require("datasets", "datasets").Value
    return isinstance(feature, value) and feature.dtype.startswith(("int", "uint"))


def read_labels(rows: Any, column: str | None, where: str) -> tuple[Tensor | None, int | None]:
    """Returns the labels [n] in ``column`` and the number of classes.

    Both are None where there is no column. Raises DataError for a label that is no class.
    """
    if column is None:
        return None, None
    cells = rows.select_columns([column]).with_format("numpy")[:][column]
    labels = check_labels(np.asarray(cells), len(rows), f"{where}, column {column!r}")
    feature = rows.features[column]
    declared = isinstance(feature, require("datasets", "datasets").ClassLabel)
    return labels, feature.num_classes if declared else int(labels.max()) + 1


def describe_columns(rows: Any) -> str:
    """Lists the columns with their types for an error message."""
    return ", ".join(
        f"{name} ({type(feature).__name__})" for name, feature in rows.features.items()
    )
