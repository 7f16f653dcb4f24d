"""Broken files: whatever is wrong with the bytes, one clear error, and the model as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.files import check_file
from tests.oracle import assert_same

FILES = int(os.environ.get("SPARSEDM_BROKEN_FILES", "1200"))
"""Broken files in all: SPARSEDM_BROKEN_FILES=10000 before a release of the format."""

FORMS = ("state", "dense", "compact")


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(8, 8, bias=index == 0) for index in range(4)])


@pytest.fixture(scope="module")
def student() -> nn.Module:
    model = sdm.compile(chain(), "2:4", overrides={"2": "2:4t"}, backend="eager")
    model(torch.randn(1, 8))
    return model


@pytest.fixture(scope="module")
def contents(student: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("sound") / "s.safetensors"
    files = {}
    for form in FORMS:
        sdm.save(student, path, form=form)
        files[form] = path.read_bytes()
    return files


def load_or_refuse(path: Path) -> None:
    """Reads a file that may be broken: into a model, and to be checked."""
    target = chain()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    for read in (lambda: sdm.load(path, target, backend="eager"), lambda: check_file(path)):
        with suppress(sdm.SparseDMError):
            read()
    for name, tensor in target.state_dict().items():
        assert_same(tensor, before[name])


Edit = Callable[[bytes], bytes]


@st.composite
def edits(draw: Any) -> tuple[str, Edit]:
    """Draws what to do to a file: cut it, add to it, or change some of its bytes."""
    kind = draw(st.sampled_from(["cut", "extend", "bytes", "header", "length"]))
    where = draw(st.floats(0, 1))
    junk = draw(st.binary(min_size=1, max_size=12))

    def edit(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        if kind == "cut":
            return content[: int(where * len(content))]
        if kind == "extend":
            return content + junk
        if kind == "length":
            return junk[:8].ljust(8, b"\0") + content[8:]
        span = 8 + length if kind == "header" else len(content)
        start = 8 + int(where * (span - 8)) if kind == "header" else int(where * span)
        return content[:start] + junk + content[start + len(junk) :]

    return kind, edit


@settings(max_examples=5 * FILES // 12, deadline=None, suppress_health_check=list(HealthCheck))
@given(edit=edits(), form=st.sampled_from(FORMS))
def test_file_of_broken_bytes_is_refused_or_read_whole(
    edit: tuple[str, Edit], form: str, contents: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(edit[1](contents[form]))
    load_or_refuse(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)


def list_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths to every value in a record."""
    paths = [path]
    keys: Any = value if isinstance(value, dict) else ()
    for key in range(len(value)) if isinstance(value, list) else keys:
        paths += list_paths(value[key], (*path, key))
    return paths


def read_parts(content: bytes, folder: Path) -> tuple[dict[str, Tensor], Any]:
    path = folder / "parts.safetensors"
    path.write_bytes(content)
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["sparsedm"])


@settings(max_examples=5 * FILES // 12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), form=st.sampled_from(FORMS), value=JSON)
def test_record_of_other_values_is_refused_or_read_whole(
    data: st.DataObject, form: str, value: Any, contents: dict[str, bytes], tmp_path: Path
) -> None:
    tensors, record = read_parts(contents[form], tmp_path)
    target = data.draw(st.sampled_from(list_paths(record)))
    if target:
        inner = record
        for key in target[:-1]:
            inner = inner[key]
        inner[target[-1]] = value
    else:
        record = value
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path, {"sparsedm": json.dumps(record)})
    load_or_refuse(path)


@settings(max_examples=2 * FILES // 12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_compact_file_with_other_tensors_is_refused_or_read_whole(
    data: st.DataObject, contents: dict[str, bytes], tmp_path: Path
) -> None:
    tensors, record = read_parts(contents["compact"], tmp_path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["gone", "short", "long", "dtype", "shape", "high"]))
    tensor = tensors[name]
    changed = {
        "short": tensor.flatten()[:-1],
        "long": torch.cat([tensor.flatten()] * 2),
        "dtype": tensor.to(torch.float16),
        "shape": tensor.reshape(1, -1),
        "high": torch.full_like(tensor, 255),
    }
    if kind == "gone":
        del tensors[name]
    else:
        tensors[name] = changed[kind].contiguous()
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path, {"sparsedm": json.dumps(record)})
    load_or_refuse(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 4}, "format version 4, this package reads 5"),
        ({"form": "zip"}, "form 'zip' is none of state, dense, compact"),
        (
            {"compact": {"9.weight": {"pattern": "2:4", "shape": [8, 8]}}},
            "9.weight.sparsedm_values",
        ),
        ({"compact": {"1.weight": {"pattern": "2:4", "shape": [8, 16]}}}, r"\[32\] values, not"),
        ({"compact": {"1.weight": {"pattern": "2:4", "shape": [8.0, 8]}}}, "not of integers"),
        (
            {"compact": {"1.weight": {"pattern": "1:4", "shape": [8, 16]}}},
            "12 indices|not .* bytes",
        ),
        ({"aliases": {"0.bias": "1.weight"}}, "'0.bias' is a second name"),
        ({"provenance": {"loss": "low"}}, "provenance loss 'low' is not a float"),
        ({"provenance": {"mood": 1}}, "provenance 'mood' is none of base_model"),
    ],
    ids=str,
)
def test_compact_file_with_a_wrong_record_says_what_is_wrong(
    change: dict[str, Any], message: str, contents: dict[str, bytes], tmp_path: Path
) -> None:
    tensors, record = read_parts(contents["compact"], tmp_path)
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path, {"sparsedm": json.dumps({**record, **change})})
    with pytest.raises(sdm.CheckpointError, match=message):
        sdm.load(path, chain())


def test_deeply_nested_record_is_refused(contents: dict[str, bytes], tmp_path: Path) -> None:
    tensors, _ = read_parts(contents["compact"], tmp_path)
    save_file(tensors, tmp_path / "deep", {"sparsedm": "[" * 100_000})
    with pytest.raises(sdm.CheckpointError, match="metadata is damaged"):
        sdm.load(tmp_path / "deep", chain())


def test_small_file_that_claims_a_huge_weight_is_refused_before_it_is_made(tmp_path: Path) -> None:
    shape = [1 << 20, 1 << 21]
    tensors = {
        "w.sparsedm_values": torch.zeros(1 << 20),
        "w.sparsedm_indices": torch.zeros(3 << 20, dtype=torch.uint8),
    }
    record = {"version": 5, "form": "compact", "compact": {"w": {"pattern": "1:2@4x8"}}}
    record["compact"]["w"].update(pattern="1:999999", shape=[1, 999999 * 2])
    tensors = {name: tensor[:2].clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "bomb", {"sparsedm": json.dumps(record)})
    with pytest.raises(sdm.CheckpointError, match=r"metadata is damaged: .* bytes"):
        check_file(tmp_path / "bomb")
    record["compact"]["w"].update(pattern="1:2", shape=shape)
    save_file(tensors, tmp_path / "bomb", {"sparsedm": json.dumps(record)})
    with pytest.raises(sdm.CheckpointError, match=r"\[2\] values, not the 1099511627776"):
        check_file(tmp_path / "bomb")
