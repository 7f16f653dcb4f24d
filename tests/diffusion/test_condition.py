"""Conditions in files; in rows they are tested beside guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsedm_compiler.diffusion.condition import check_labels, move, read_condition
from sparsedm_compiler.errors import DataError
from sparsedm_compiler.models.presets import from_diffusers
from tests.oracle import assert_same
from tests.zoo import FAMILIES


def test_read_condition_returns_the_tensors_of_a_file(tmp_path: Path) -> None:
    given = {"context": torch.randn(2, 3), "scale": torch.tensor(2.0)}
    save_file(given, tmp_path / "a.safetensors")
    torch.testing.assert_close(read_condition(tmp_path / "a.safetensors"), given, rtol=0, atol=0)


def test_read_condition_of_a_broken_or_empty_file_raises(tmp_path: Path) -> None:
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    save_file({}, tmp_path / "empty.safetensors")
    for name, says in (
        ("gone.safetensors", r"cannot read the condition .*gone"),
        ("noise.safetensors", r"cannot read the condition .*noise"),
        ("empty.safetensors", r"empty\.safetensors holds no tensors"),
    ):
        with pytest.raises(DataError, match=says):
            read_condition(tmp_path / name)


def test_move_pins_what_a_pinned_copy_can_be_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        copy = torch.empty_strided(tensor.shape, tensor.stride()).copy_(tensor)  # as torch does
        pinned.append(copy)
        return copy

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", lambda self, *_, **__: self)
    null = torch.randn(1, 3)
    for tensor in (null.expand(4, 3), torch.randn(4, 6)[:, ::2], torch.randn(3)):
        assert_same(move(tensor, torch.device("cuda")), tensor)
    assert len(pinned) == 3


@pytest.mark.parametrize(("labels", "wrong"), [([0, 5], 5), ([-1, 2], None), ([0, 4], None)])
def test_check_labels_names_one_beyond_the_embedding_of_labels(
    labels: list[int], wrong: int | None
) -> None:
    model = nn.ModuleDict({"time_emb": nn.Embedding(2, 2), "label_emb": nn.Embedding(5, 2)})
    given = torch.tensor(labels)
    if wrong is None:
        check_labels(model, given)
        check_labels(nn.ModuleDict({"time_emb": nn.Embedding(2, 2)}), torch.tensor([99]))
        return
    with pytest.raises(DataError, match=f"label {wrong} is none of the 5 classes of ModuleDict"):
        check_labels(model, given)


@pytest.mark.parametrize("name", ["uvit", "unet", "dit"])
def test_check_labels_knows_the_tables_of_models(name: str) -> None:
    if name == "unet":
        options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "num_class_embeds": 10}
        kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        model = from_diffusers("UNet2DModel", {**options, **kinds, "sample_size": 8})
    else:
        model = next(family for family in FAMILIES if family.name == name).build()
    check_labels(model, torch.tensor([9]))
    with pytest.raises(DataError, match="label 11 is none of the 1"):
        check_labels(model, torch.tensor([11]))
