"""Saved files: what is in them, and every way they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsedm_compiler as sdm
from tests.oracle import assert_same


class Tied(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))
        self.c.weight = self.b.weight
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    student = sdm.compile(
        Tied(), "1:4", keep_dense=lambda name: name.startswith("a"), policy="all", backend="eager"
    )
    student(torch.randn(1, 8))
    sdm.save(student, tmp_path / "s.safetensors")
    return student, tmp_path / "s.safetensors"


def test_student_when_saved_is_plain_safetensors(saved: tuple[nn.Module, Path]) -> None:
    student, path = saved
    tensors = load_file(path)
    assert sorted({*student.state_dict()} - {*tensors}) == ["c.weight"]
    for name, tensor in tensors.items():
        assert_same(tensor, student.state_dict()[name])
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["sparsedm"])
    assert (meta["options"]["pattern"], meta["class"], meta["version"]) == ("1:4", "Tied", 5)
    assert meta["aliases"] == {"c.weight": "b.weight"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_student_when_loaded_is_the_saved_one(saved: tuple[nn.Module, Path]) -> None:
    student, path = saved
    dense = Tied()
    before = dense.b.weight.clone()
    loaded = sdm.load(path, dense, backend="eager")
    x = torch.randn(2, 8)
    assert {str(p) for _, p in sdm.masked_parameters(loaded).values()} == {"1:4"}
    assert_same(loaded(x), student(x))
    assert sdm.explain(loaded).rows == sdm.explain(student).rows
    assert loaded.c.weight is loaded.b.weight
    assert_same(dense.b.weight, before)


def test_student_when_saved_before_the_first_call_keeps_its_options(tmp_path: Path) -> None:
    student = sdm.compile(Tied(), "1:2", overrides={"b": "1:8"}, backend="eager")
    sdm.save(student, tmp_path / "s")
    loaded = sdm.load(tmp_path / "s", Tied(), backend="eager")
    x = torch.randn(2, 8)
    assert_same(loaded(x), student(x))
    assert {str(p) for _, p in sdm.masked_parameters(loaded).values()} == {"1:8"}


def test_load_of_unfit_files_and_models_raises(
    saved: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    _, path = saved
    with pytest.raises(sdm.CheckpointError, match=r"cannot read .*nowhere"):
        sdm.load(tmp_path / "nowhere", Tied())
    (tmp_path / "noise").write_bytes(b"not safetensors at all")
    with pytest.raises(sdm.CheckpointError, match=r"cannot read .*noise"):
        sdm.load(tmp_path / "noise", Tied())
    save_file({"x": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(sdm.CheckpointError, match="holds no sparsedm pattern"):
        sdm.load(tmp_path / "plain", Tied())
    with pytest.raises(sdm.CheckpointError, match="holds a Tied and does not fit this Tied"):
        sdm.load(path, Tied(16))
    with pytest.raises(sdm.CheckpointError, match="does not fit this Linear"):
        sdm.load(path, nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 9}, "format version 9"),
        ({"options": {"pattern": "9:1", "overrides": {}}}, "metadata is damaged"),
        ({"options": {"pattern": "2:4"}}, "metadata is damaged"),
        ({"decisions": [{}]}, "metadata is damaged"),
        ({"decisions": {"b.weight": "linear"}}, "'linear' is no decision about 'b.weight'"),
        ({"decisions": {"e.weight": "linear 2:4"}}, "which does not have 'e.weight' and 0 more"),
        ({"aliases": {"c.weight": "gone"}}, "metadata is damaged"),
    ],
)
def test_load_with_damaged_metadata_raises(
    saved: tuple[nn.Module, Path], change: dict[str, Any], error: str
) -> None:
    _, path = saved
    with safe_open(path, framework="pt") as file:
        meta = {**json.loads(file.metadata()["sparsedm"]), **change}
    save_file(load_file(path), path, {"sparsedm": json.dumps(meta)})
    with pytest.raises(sdm.CheckpointError, match=error):
        sdm.load(path, Tied())


def test_save_of_unfit_models_raises(tmp_path: Path) -> None:
    with pytest.raises(sdm.ConfigError, match="was not compiled"):
        sdm.save(Tied(), tmp_path / "s")
    student = sdm.compile(Tied(), "2:4", backend="eager")
    with pytest.raises(sdm.CheckpointError, match="cannot write"):
        sdm.save(student, tmp_path / "no" / "such" / "folder")


def test_save_when_it_fails_leaves_the_old_file(
    saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, path = saved
    before = path.read_bytes()

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sparsedm_compiler.compiler.serialization.os.replace", fails)
    with pytest.raises(sdm.CheckpointError, match="disk full"):
        sdm.save(student, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_load_of_a_dense_file_whose_zeros_are_not_of_its_pattern_raises(tmp_path: Path) -> None:
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    student = sdm.compile(net, "2:4", backend="eager")
    student(torch.zeros(1, 8))
    path = tmp_path / "dense.safetensors"
    sdm.save(student, path, form="dense")
    sdm.load(path, net, backend="eager")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["1.weight"][0, :4] = 1
    save_file(tensors, path, metadata)
    with pytest.raises(sdm.CheckpointError, match=r"1\.weight' is declared to be 2:4"):
        sdm.load(path, net, backend="eager")
