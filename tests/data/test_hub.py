"""Datasets of the package datasets, saved to disk by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from torch import Tensor

from sparsedm_compiler.data import HubData, ReadOptions, open_data
from sparsedm_compiler.errors import DataError
from tests.data.cases import expected, pixels

IMAGES = pixels(5, 4, 6, 3)
LABELS = [1, 0, 3, 1, 0]
NAMES = ["ant", "bee", "cat", "dog", "eel"]
EMBEDDED = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def rows(**columns: tuple[Any, list[Any]]) -> Dataset:
    """A dataset of IMAGES under "picture" and of other columns, each (feature, values)."""
    pictures = [Image.fromarray(image) for image in IMAGES]
    columns = {"picture": (datasets.Image(), pictures), **columns}
    features = Features({name: feature for name, (feature, _) in columns.items()})
    values = {name: values for name, (_, values) in columns.items()}
    return Dataset.from_dict(values, features=features)


def labelled() -> Dataset:
    size = (Value("int64"), [7] * 5)
    return rows(width=size, animal=(ClassLabel(names=NAMES), LABELS), label=size)


def test_hub_columns_are_chosen_by_their_types(tmp_path: Path) -> None:
    labelled().save_to_disk(tmp_path / "set")
    data = open_data(f"hf:{tmp_path / 'set'}")
    found, labels = data.fetch([3, 0, 3])
    torch.testing.assert_close(found, expected(IMAGES)[[3, 0, 3]], rtol=0, atol=1e-6)
    assert isinstance(labels, Tensor)
    assert (labels.tolist(), labels.dtype) == ([1, 1, 1], torch.int64)
    assert (len(data), data.shape, data.classes) == (5, (3, 4, 6), 5)
    assert data.fetch([])[0].shape == (0, 3, 4, 6)


def test_hub_with_labels_limit_and_size(tmp_path: Path) -> None:
    labelled().save_to_disk(tmp_path / "set")
    data = open_data(f"hf:{tmp_path / 'set'}", labels=False, limit=2, size=2)
    assert (len(data), data.shape, data.classes) == (2, (3, 2, 2), None)
    found, labels = data.fetch([1])
    assert labels is None
    box = IMAGES[1:2, :, 1:5].reshape(1, 2, 2, 2, 2, 3).mean((2, 4))
    np.testing.assert_allclose((found.permute(0, 2, 3, 1) + 1) * 127.5, box, rtol=0, atol=1.01)
    with pytest.raises(IndexError):
        data.fetch([2])


def test_hub_splits(tmp_path: Path) -> None:
    whole = labelled()
    parts = {"train": whole.select([0, 1, 2]), "test": whole.select([4, 3])}
    path = tmp_path / "sets"
    DatasetDict(parts).save_to_disk(path)
    for spec, numbers in ((f"hf:{path}", [0, 1, 2]), (f"hf:{path}:test", [4, 3])):
        found, labels = open_data(spec).fetch(range(len(numbers)))
        torch.testing.assert_close(found, expected(IMAGES)[numbers], rtol=0, atol=1e-6)
        assert isinstance(labels, Tensor)
        assert labels.tolist() == [LABELS[number] for number in numbers]
    with pytest.raises(DataError, match="splits train, test, no 'val'"):
        open_data(f"hf:{path}:val")
    DatasetDict({"only": parts["test"]}).save_to_disk(tmp_path / "one")
    assert len(open_data(f"hf:{tmp_path / 'one'}")) == 2
    DatasetDict({"a": whole, "b": whole}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="splits a, b, no 'train'"):
        open_data(f"hf:{tmp_path / 'two'}")
    whole.save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="single dataset"):
        open_data(f"hf:{tmp_path / 'set'}:test")


def test_hub_integers_are_labels_by_column_name_only() -> None:
    assert HubData(rows(label=(Value("int32"), LABELS))).classes == 4
    assert HubData(rows(y=(Value("uint8"), LABELS))).classes == 4
    assert HubData(rows(width=(Value("int32"), LABELS))).classes is None
    assert HubData(rows(label=(Value("string"), [*"abcde"]))).classes is None
    assert HubData(rows(width=(Value("int32"), LABELS)), label="width").classes == 4


def test_hub_embeddings_become_named_conditions() -> None:
    embedded = (datasets.Array2D((2, 3), "float32"), [*EMBEDDED])
    nested = (datasets.List(datasets.List(Value("float32"))), EMBEDDED.tolist())
    for column in (embedded, nested):
        given = rows(clip=column, label=(Value("int64"), LABELS))
        asked = {"context": "clip", "y": "label"}
        data = HubData(given, conditions=asked, options=ReadOptions(limit=4))
        _, found = data.fetch([2, 0])
        assert isinstance(found, dict)
        torch.testing.assert_close(found["context"], torch.from_numpy(EMBEDDED[[2, 0]]))
        assert found["y"].tolist() == [3, 1]
        assert data.classes is None


def test_hub_ignores_the_format_of_the_dataset() -> None:
    for given in (labelled().with_format("numpy"), labelled().with_transform(lambda batch: {})):
        found, labels = HubData(given).fetch([1])
        torch.testing.assert_close(found, expected(IMAGES)[1:2], rtol=0, atol=1e-6)
        assert isinstance(labels, Tensor)
        assert labels.tolist() == LABELS[1:2]


def test_hub_dataset_that_does_not_fit_raises() -> None:
    whole = labelled()
    two = rows(fine=(ClassLabel(5), LABELS), coarse=(ClassLabel(4), LABELS))
    ragged = rows(clip=(datasets.List(Value("float32")), [[0.0] * n for n in range(5)]))
    pair = rows(second=(datasets.Image(), [Image.fromarray(image) for image in IMAGES]))
    cases: list[tuple[Dataset, dict[str, Any], str]] = [
        (whole.remove_columns("picture"), {}, r"0 columns of type Image.*animal \(ClassLabel\)"),
        (pair, {}, "has 2 columns of type Image"),
        (whole.select([]), {}, "no images"),
        (two, {}, "several columns of classes: fine, coarse"),
        (whole, {"label": "none"}, "no column 'none', but picture"),
        (whole, {"conditions": {"context": "none"}}, "no column 'none'"),
        (rows(label=(ClassLabel(5), [-1] * 5)), {}, "'label': label -1 is below 0"),
        (rows(label=(Value("int64"), [None] * 5)), {}, "are not the numbers of classes"),
    ]
    for given, options, message in cases:
        with pytest.raises(DataError, match=message):
            HubData(given, **options)
    with pytest.raises(DataError, match="rows of 'clip' differ in shape"):
        HubData(ragged, conditions={"context": "clip"}).fetch([1, 2])
    assert HubData(two, label="coarse").classes == 4
    assert HubData(two, options=ReadOptions(labels=False)).classes is None


def test_fetch_of_a_broken_hub_image_names_its_row(tmp_path: Path) -> None:
    cells = [{"bytes": None, "path": str(tmp_path / "none.png")}, {"bytes": b"x", "path": None}]
    good = Image.fromarray(IMAGES[0])
    given = Dataset.from_dict(
        {"image": [good, *cells, None]}, features=Features({"image": datasets.Image()})
    )
    data = HubData(given, where="this")
    for number, message in ((1, "none.png"), (2, "cannot be read"), (3, "has no image")):
        with pytest.raises(DataError, match=f"row {number} of this.*{message}"):
            data.fetch([0, number])


def test_hub_folder_without_a_dataset_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*none"):
        open_data(f"hf:{tmp_path}/none")
    with pytest.raises(DataError, match=r"cannot read .* as a dataset"):
        open_data(f"hf:{tmp_path}")
