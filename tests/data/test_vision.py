"""Datasets of torchvision, from files as it downloads them, tiny ones."""

from __future__ import annotations

import csv
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from torch import Tensor

from sparsedm_compiler.data import open_data
from sparsedm_compiler.errors import DataError
from tests.data.cases import expected, pixels, save

GREY = pixels(5, 28, 28)
COLOUR = pixels(6, 32, 32, 3)
LABELS = np.array([3, 1, 4, 1, 5, 9], np.uint8)


def mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, rows in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        images, labels = GREY[rows], LABELS[:5][rows]
        head = struct.pack(">4i", 2051, len(images), 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">2i", 2049, len(labels))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def cifar(root: Path, patch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CIFAR10
    patch.setattr(kind, "train_list", [["data_batch_1", None]])
    patch.setattr(kind, "test_list", [["test_batch", None]])
    patch.setattr(kind, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    (root / kind.base_folder).mkdir()
    parts = {"data_batch_1": slice(0, 4), "test_batch": slice(4, 6)}
    for name, rows in parts.items():
        flat = COLOUR[rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
        entry = {"data": flat, "labels": LABELS[rows].tolist()}
        (root / kind.base_folder / name).write_bytes(pickle.dumps(entry))
    (root / kind.base_folder / "meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))


def svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.SVHN
    patch.setattr(kind, "split_list", {"test": ["", "test.mat", None]})
    labels = np.where(LABELS == 0, 10, LABELS)[:, None]  # as published: 10 is the digit 0
    scipy.io.savemat(root / "test.mat", {"X": COLOUR.transpose(1, 2, 3, 0), "y": labels})


def celeba(root: Path, patch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CelebA
    folder = root / kind.base_folder
    names = [f"{number}.png" for number in range(4)]
    for name, image in zip(names, COLOUR, strict=False):
        save(folder / "img_align_celeba" / name, image[:, :20])
    files = {
        "list_eval_partition.txt": ([], [0, 2, 0, 2]),
        "identity_CelebA.txt": ([], [1, 2, 3, 4]),
        **{
            f"list_{name}.txt": ([["4"], ["a"]], [1] * 4)
            for name in ("bbox_celeba", "landmarks_align_celeba", "attr_celeba")
        },
    }
    for file, (head, values) in files.items():
        with (folder / file).open("w", newline="") as stream:
            rows = [[name, str(value)] for name, value in zip(names, values, strict=True)]
            csv.writer(stream, delimiter=" ").writerows([*head, *rows])
    patch.setattr(kind, "file_list", [("", None, name) for name in files])


def checked(spec: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raises AssertionError where the source is not these images and labels."""
    data = open_data(spec)
    found, y = data.fetch(range(len(data)))
    torch.testing.assert_close(found, expected(images), rtol=0, atol=1e-6)
    assert isinstance(y, Tensor)
    assert y.tolist() == labels.tolist()
    assert (data.shape, data.classes) == (tuple(found.shape[1:]), labels.max() + 1)


def test_mnist(tmp_path: Path) -> None:
    mnist(tmp_path)
    checked(f"torchvision:MNIST:{tmp_path}", GREY[:3, ..., None], LABELS[:3])
    checked(f"torchvision:MNIST:{tmp_path}:train", GREY[:3, ..., None], LABELS[:3])
    checked(f"torchvision:MNIST:{tmp_path}:test", GREY[3:, ..., None], LABELS[3:5])
    data = open_data(f"torchvision:MNIST:{tmp_path}", size=14, labels=False, limit=2)
    assert (len(data), data.shape, data.classes) == (2, (1, 14, 14), None)
    with pytest.raises(DataError, match="train and test, no 'val'"):
        open_data(f"torchvision:MNIST:{tmp_path}:val")


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar(tmp_path, monkeypatch)
    checked(f"torchvision:CIFAR10:{tmp_path}", COLOUR[:4], LABELS[:4])
    checked(f"torchvision:CIFAR10:{tmp_path}:test", COLOUR[4:], LABELS[4:])


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svhn(tmp_path, monkeypatch)
    checked(f"torchvision:SVHN:{tmp_path}:test", COLOUR, LABELS)
    with pytest.raises(DataError, match="SVHN"):
        open_data(f"torchvision:SVHN:{tmp_path}:val")


def test_celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    celeba(tmp_path, monkeypatch)
    data = open_data(f"torchvision:CelebA:{tmp_path}")
    assert (len(data), data.shape, data.classes) == (2, (3, 32, 20), None)
    found, labels = data.fetch([1, 0])
    assert labels is None
    torch.testing.assert_close(found, expected(COLOUR[[2, 0], :, :20]), rtol=0, atol=1e-6)
    assert len(open_data(f"torchvision:CelebA:{tmp_path}:test")) == 2


def test_missing_torchvision_dataset_raises(tmp_path: Path) -> None:
    for name in ("MNIST", "CIFAR10", "SVHN", "STL10", "CelebA"):
        with pytest.raises(DataError, match=rf"{name} in .*download=True\) on a machine"):
            open_data(f"torchvision:{name}:{tmp_path}")
    with pytest.raises(DataError, match=r"'ImageNet' is not among CIFAR10, .* opens as a folder"):
        open_data(f"torchvision:ImageNet:{tmp_path}")
    assert not list(tmp_path.iterdir())
