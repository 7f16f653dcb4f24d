"""Fingerprints change with everything a run is computed from, and with nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparsedm_compiler.data import TensorData, fingerprint, latents, open_data
from sparsedm_compiler.data.fingerprint import hash_all, spread_numbers
from sparsedm_compiler.diffusion import generator_at, make_scheduler
from sparsedm_compiler.errors import CheckpointError
from sparsedm_compiler.train.fingerprints import (
    Fingerprint,
    fingerprint_condition,
    fingerprint_data,
    fingerprint_settings,
    fingerprint_weights,
    format_record,
    list_differences,
    read_record,
)


class Random(Dataset[Any]):
    """Images that differ at every reading, and how often one was read."""

    def __init__(self, count: int) -> None:
        self.count, self.reads = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        self.reads += 1
        return torch.rand(1, 2, 2)


def test_fingerprint_data_of_images_follows_their_content() -> None:
    images = torch.randn(200, 1, 2, 2, generator=generator_at("fingerprints"))
    labels = torch.arange(200) % 3
    first = fingerprint_data((images, labels))
    assert first == fingerprint_data((images.clone(), labels.clone()))
    assert first.about == "200 images [1, 2, 2]"
    others: list[Any] = [images, images[:199], (images, labels.flip(0)), (images.half(), labels)]
    others += [(images.flip(0), labels), TensorData(images, labels), TensorData(images + 1, labels)]
    digests = {fingerprint_data(other).sha256 for other in others}
    assert len({first.sha256, *digests}) == len(others) + 1
    assert fingerprint_data(TensorData(images)) == fingerprint_data(TensorData(images.clone()))


def open_tensors(folder: Path, images: Tensor) -> Any:
    return images, torch.zeros(len(images), dtype=torch.int64)


def open_tensor_data(folder: Path, images: Tensor) -> Any:
    return TensorData(images)


def open_latents(folder: Path, images: Tensor) -> Any:
    save_file({"latents": images}, folder / "x.safetensors")
    return open_data(folder / "x.safetensors")


def open_files(folder: Path, images: Tensor) -> Any:
    for number, image in enumerate(images):
        size = 8 + int(image.sum() > 0)
        Image.new("RGB", (size, size)).save(folder / f"{number:03d}.bmp")
    return open_data(folder, size=8)


@pytest.mark.parametrize("open_it", [open_tensors, open_tensor_data, open_latents, open_files])
def test_fingerprint_data_when_one_image_beside_the_sampled_ones_changes_differs(
    open_it: Callable[[Path, Tensor], Any], tmp_path: Path
) -> None:
    changed = 7
    assert changed not in spread_numbers(200)
    images = torch.zeros(200, 1, 2, 2)
    first, again = (fingerprint_data(open_it(tmp_path, images)) for _ in range(2))
    assert first.is_like(again)
    images = images.index_fill(0, torch.tensor(changed), 1.0)
    other = fingerprint_data(open_it(tmp_path, images))
    assert first.sha256 == other.sha256
    assert len(list_differences({"data": first}, {"data": other})) == 1
    earlier = Fingerprint(first.about, first.sha256)  # a record of an earlier version
    assert not list_differences({"data": earlier}, {"data": other})
    assert not list_differences({"data": first}, {"data": earlier})


def test_fingerprint_data_of_a_large_file_of_latents_samples_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_latents(tmp_path, torch.zeros(4, 1, 2, 2))
    assert fingerprint_data(data).content is not None
    monkeypatch.setattr(latents, "HASHED_BYTES", 4 * 16 - 1)
    assert fingerprint_data(data).content is None


def test_hash_of_all_values_when_they_are_cut_into_chunks_sees_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 8)
    rows = torch.arange(5.0)
    hashes = {hash_all([rows + (torch.arange(5) == changed)]) for changed in range(6)}
    assert len(hashes) == 6
    assert hash_all([rows[:3], rows[3:]]) != hash_all([rows])


def test_fingerprint_data_of_any_dataset_reads_no_image() -> None:
    data = Random(7)
    assert fingerprint_data(data) == fingerprint_data(Random(7)) != fingerprint_data(Random(8))
    assert data.reads == 0
    assert fingerprint_data(data).about == "a Random of length 7"
    assert fingerprint_data(iter([])).about == "a list_iterator"


def test_fingerprint_weights_follows_weights_and_leaves_out_adapters() -> None:
    model, again = nn.Linear(3, 2), nn.Linear(3, 2)
    assert fingerprint_weights(model) != fingerprint_weights(again)
    again.load_state_dict(model.state_dict())
    assert fingerprint_weights(model) == fingerprint_weights(again)
    assert fingerprint_weights(model).about == "Linear of 8 parameters"
    model.weight.requires_grad_(False)  # the bias is trained, and begins at random
    again.weight.requires_grad_(False)
    again.bias.data.add_(1)
    prints = [fingerprint_weights(part, frozen=True) for part in (model, again)]
    assert prints[0] == prints[1]
    assert fingerprint_weights(model) != fingerprint_weights(again)
    again.weight.data[0, 0] += 1
    assert fingerprint_weights(again, frozen=True) != prints[0]


def test_fingerprint_settings_follows_scheduler_and_optimizer() -> None:
    weight = nn.Parameter(torch.zeros(2))
    digests = set()
    for lr in (1.0, 2.0):
        for betas in (None, {"beta_end": 0.01}):
            scheduler = make_scheduler("ddpm", "eps", betas=betas)
            prints = fingerprint_settings(scheduler, torch.optim.SGD([weight], lr=lr))
            assert {name: part.about for name, part in prints.items()} == {
                "scheduler": "DDPMScheduler",
                "optimizer": "SGD",
            }
            digests.add(tuple(part.sha256 for part in prints.values()))
    assert len(digests) == 4
    assert len({part for pair in digests for part in pair}) == 4
    assert fingerprint_settings(None, None) == {}


def test_fingerprint_condition_follows_names_and_values() -> None:
    text = {"text": torch.zeros(1, 2)}
    assert fingerprint_condition(text) == fingerprint_condition({"text": torch.zeros(1, 2)})
    for other in ({"text": torch.ones(1, 2)}, {"words": torch.zeros(1, 2)}, torch.zeros(1, 2)):
        assert fingerprint_condition(other).sha256 != fingerprint_condition(text).sha256


def test_read_record_is_the_inverse_of_format_record(tmp_path: Path) -> None:
    prints = {"data": Fingerprint("3 images", "ab"), "teacher": Fingerprint("UViT", "cd")}
    assert read_record(tmp_path) is None
    (tmp_path / "inputs.json").write_text(format_record(prints))
    assert read_record(tmp_path) == prints
    for text in ("{", "[]", json.dumps({"data": {"about": "x"}}), json.dumps({"data": 3})):
        (tmp_path / "inputs.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"cannot read .*inputs\.json"):
            read_record(tmp_path)


def test_list_differences_says_both_values() -> None:
    one, other = Fingerprint("3 images", "a" * 64), Fingerprint("3 images", "b" * 64)
    assert list_differences({"data": one}, {"data": one}) == []
    assert list_differences({"data": one}, {"data": other}) == [
        "data 3 images, sha256 aaaaaaaa, not bbbbbbbb"
    ]
    four = Fingerprint("4 images", "c" * 64)
    assert list_differences({"data": one}, {"data": four, "null": one}) == [
        "data 3 images, not 4 images",
        "null none, not 3 images",
    ]
    assert list_differences({"data": one}, {}) == ["data 3 images, not none"]
