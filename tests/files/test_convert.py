"""Files that are checked and converted, ours and those of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import Pattern
from sparsedm_compiler.files import check_file, convert_file, make_model_card
from tests.files.cases import PATTERNS, sparse_weight
from tests.oracle import assert_same, brute_mask


class Tied(nn.Module):
    """Layers of 16 by 16, two of which share a weight that only one of their names decides on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.c.weight = self.b.weight
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


X = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))


def compiled(pattern: str = "2:4", **options: Any) -> nn.Module:
    student = sdm.compile(Tied(), pattern, policy="all", backend="eager", **options)
    with torch.no_grad():
        student(X)
    return student


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("form", ["dense", "compact"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4x4", "8:2:8", "2:4t", "1:2@8x4+2:4"])
def test_student_when_saved_masked_and_loaded_runs_the_same(
    mode: str, form: str, pattern: str, tmp_path: Path
) -> None:
    options = {"kernels": {"*": "dense"}} if mode == "infer" else {}
    student = compiled(pattern, mode=mode, **options)
    sdm.save(student, tmp_path / "s", form=form)
    loaded = sdm.load(tmp_path / "s", Tied(), backend="eager")
    with torch.no_grad():
        assert_same(loaded(X), student(X))
    assert {*sdm.explain(loaded).rows} == {*sdm.explain(student).rows}
    assert loaded.c.weight is loaded.b.weight
    weight = Tied().b.weight.detach()
    assert_same(loaded.b.weight.detach(), weight * brute_mask(weight, pattern))


def test_student_when_saved_dense_is_read_by_every_reader(tmp_path: Path) -> None:
    sdm.save(compiled(), tmp_path / "s", form="dense")
    plain = Tied()
    plain.load_state_dict(load_file(tmp_path / "s"), strict=False)
    assert_same(plain(X), compiled()(X))


@pytest.mark.parametrize("form", ["state", "dense", "compact"])
def test_finalized_student_with_a_tied_weight_when_saved_loads(form: str, tmp_path: Path) -> None:
    student = compiled("1:8", mode="infer", finalize=True, kernels={"*": "sparse"})
    assert student.b.weight.isnan().all()  # hollow
    sdm.save(student, tmp_path / "s", form=form)
    loaded = sdm.load(tmp_path / "s", Tied(), backend="eager")
    with torch.no_grad():
        assert_same(loaded(X), student(X))


@pytest.mark.parametrize("form", ["state", "dense", "compact"])
def test_frozen_masks_are_saved_in_every_form(form: str, tmp_path: Path) -> None:
    student = compiled()
    sdm.freeze_masks(student)
    with torch.no_grad():
        student.a.weight.zero_()  # whose mask nothing but the file tells
    sdm.save(student, tmp_path / "s", form=form)
    loaded = sdm.load(tmp_path / "s", Tied(), backend="eager")
    ours, theirs = student._sparsedm.frozen, loaded._sparsedm.frozen
    assert len(ours) == 3
    assert ours.equals(theirs)


def test_save_of_what_is_not_decided_or_of_an_unknown_form_is_refused(tmp_path: Path) -> None:
    fresh = sdm.compile(Tied(), "2:4", backend="eager")
    for form in ("dense", "compact"):
        with pytest.raises(sdm.ConfigError, match="has not been called since compile"):
            sdm.save(fresh, tmp_path / "s", form=form)
    with pytest.raises(sdm.ConfigError, match="form 'zip' is none of state, dense, compact"):
        sdm.save(fresh, tmp_path / "s", form="zip")
    with pytest.raises(sdm.ConfigError, match="provenance 'mood' is none of"):
        sdm.save(fresh, tmp_path / "s", provenance={"mood": "good"})
    assert not (tmp_path / "s").exists()


def test_latent_file_when_converted_holds_the_masked_weights(tmp_path: Path) -> None:
    student = compiled(overrides={"d": "1:4"})
    sdm.save(student, tmp_path / "latent", provenance={"base_model": "org/base", "images": 64})
    convert_file(tmp_path / "latent", tmp_path / "compact", provenance={"loss": 0.5})
    convert_file(tmp_path / "compact", tmp_path / "dense", form="dense")
    sdm.save(student, tmp_path / "expected", form="dense")
    expected = load_file(tmp_path / "expected")
    tensors = load_file(tmp_path / "dense")
    assert {*tensors} == {*expected}
    for name, tensor in tensors.items():
        assert_same(tensor, expected[name])
    loaded = sdm.load(tmp_path / "compact", Tied(), backend="eager")
    assert_same(loaded(X), student(X))
    report = check_file(tmp_path / "dense")
    assert report.provenance == {"base_model": "org/base", "images": 64, "loss": 0.5}
    assert {row.name: str(row.declared) for row in report.rows}["d.weight"] == "1:4"


def test_check_tells_latent_weights_from_broken_promises(tmp_path: Path) -> None:
    student = compiled()
    sdm.save(student, tmp_path / "latent")
    report = check_file(tmp_path / "latent")
    assert (report.latent, report.ok) == (True, True)
    assert {row.fits for row in report.rows} == {None}
    assert not check_file(tmp_path / "latent", "2:4").ok
    sdm.save(student, tmp_path / "dense", form="dense")
    report = check_file(tmp_path / "dense")
    assert [str(row.satisfied) for row in report.rows] == ["2:4"] * 3
    assert {row.fits for row in report.rows} == {True}
    assert report.others == 5  # four biases and a buffer
    assert [row.fits for row in check_file(tmp_path / "dense", "1:4").rows] == [False] * 3


def test_check_of_compact_weights_counts_their_bytes(tmp_path: Path) -> None:
    sdm.save(compiled(), tmp_path / "c", form="compact")
    row = check_file(tmp_path / "c").rows[0]
    assert (row.stored_bytes, row.dense_bytes) == (128 * 4 + 22, 256 * 4)  # 64 groups: 22 bytes
    assert "0.521 of dense" in str(check_file(tmp_path / "c"))


def test_broken_promise_of_a_dense_file_is_seen(tmp_path: Path) -> None:
    sdm.save(compiled(), tmp_path / "dense", form="dense")
    tensors = load_file(tmp_path / "dense")
    tensors["a.weight"][0, :4] = 1
    with safe_open(tmp_path / "dense", framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "edited", metadata)
    report = check_file(tmp_path / "edited")
    assert not report.ok
    assert [row.name for row in report.rows if row.fits is False] == ["a.weight"]
    with pytest.raises(sdm.PatternError, match=r"a\.weight: the zeros do not satisfy '2:4'"):
        convert_file(tmp_path / "edited", tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "40:80"])
def test_file_of_others_with_zeros_in_place_is_converted_there_and_back(
    pattern: str, tmp_path: Path
) -> None:
    tensors = {"a": sparse_weight(pattern), "k": sparse_weight(pattern, kernel=(3,))}
    tensors |= {"dense": torch.ones(8, 8), "bias": torch.ones(8)}
    save_file(tensors, tmp_path / "s")
    convert_file(tmp_path / "s", tmp_path / "c", pattern=pattern)
    assert [str(row.declared) for row in check_file(tmp_path / "c").rows if row.declared] == [
        str(Pattern.parse(pattern))
    ] * 2
    convert_file(tmp_path / "c", tmp_path / "d", form="dense")
    again = load_file(tmp_path / "d")
    assert {*again} == {*tensors}
    for name, tensor in tensors.items():
        assert_same(again[name], tensor)


def test_file_of_others_when_converted_loads_into_its_model(tmp_path: Path) -> None:
    plain = Tied()
    with torch.no_grad():
        plain.b.weight.mul_(brute_mask(plain.b.weight, "1:8"))
    tensors = {name: t for name, t in plain.state_dict().items() if name != "c.weight"}
    save_file({**tensors, "c.weight": plain.c.weight.detach().clone()}, tmp_path / "s")
    convert_file(tmp_path / "s", tmp_path / "c")
    loaded = sdm.load(tmp_path / "c", Tied(), backend="eager")
    with torch.no_grad():
        assert_same(loaded(X), plain(X))
    assert {str(p) for _, p in sdm.masked_parameters(loaded).values()} == {"1:8"}


def test_dense_files_and_misused_options_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(8, 8)}, tmp_path / "s")
    with pytest.raises(sdm.CheckpointError, match="holds nothing sparse"):
        convert_file(tmp_path / "s", tmp_path / "c")
    with pytest.raises(sdm.ConfigError, match="form 'state' is none of dense, compact"):
        convert_file(tmp_path / "s", tmp_path / "c", form="state")
    sdm.save(compiled(), tmp_path / "d", form="dense")
    with pytest.raises(sdm.ConfigError, match="has a record of its patterns"):
        convert_file(tmp_path / "d", tmp_path / "c", pattern="2:4")
    student = compiled("1:8", mode="infer", finalize=True, kernels={"*": "sparse"})
    sdm.save(student, tmp_path / "packed")
    with pytest.raises(sdm.CheckpointError, match="weights packed for a kernel"):
        check_file(tmp_path / "packed")


def write_bitmask(weight: Tensor, path: Path, **changes: Tensor) -> None:
    """Writes a layer as compressed-tensors 0.13 did, from its description."""
    rows, width = weight.shape
    padded = torch.zeros(rows, -(-width // 8) * 8, dtype=torch.bool)
    padded[:, :width] = weight != 0
    weights = 2 ** torch.arange(8)
    bits = (padded.view(rows, -1, 8) * weights).sum(-1).to(torch.uint8)
    layer = {
        "layer.compressed": weight[weight != 0].view(rows, -1),
        "layer.bitmask": bits,
        "layer.shape": torch.tensor([[rows], [width]]),
        "other.weight": torch.ones(4, 4),
    }
    save_file({**layer, **changes}, path)


@pytest.mark.parametrize("width", [16, 12])
def test_sparse_24_bitmask_file_is_read(width: int, tmp_path: Path) -> None:
    weight = sparse_weight("2:4")[:, :width].to(torch.bfloat16)
    write_bitmask(weight, tmp_path / "s")
    assert [(r.name, str(r.satisfied)) for r in check_file(tmp_path / "s", "2:4").rows] == [
        ("other.weight", "None"),
        ("layer.weight", "2:4"),
    ]
    convert_file(tmp_path / "s", tmp_path / "d", form="dense")
    assert_same(load_file(tmp_path / "d")["layer.weight"], weight)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer.bitmask": torch.zeros(16, 2, dtype=torch.uint8)},
        {"layer.bitmask": torch.zeros(16, 3, dtype=torch.uint8)},
        {"layer.bitmask": torch.zeros(16, 2)},
        {"layer.compressed": torch.zeros(16, 7)},
        {"layer.shape": torch.tensor([16, 16, 1])},
        {"layer.shape": torch.tensor([1 << 40, 16])},
        {"layer.shape": torch.tensor([16.0, 16.0])},
        {"layer.shape": torch.tensor([-16, 16])},
    ],
)
def test_damaged_bitmask_file_is_refused(changes: dict[str, Tensor], tmp_path: Path) -> None:
    write_bitmask(sparse_weight("2:4"), tmp_path / "s", **changes)
    with pytest.raises(sdm.CheckpointError, match="'layer' is"):
        check_file(tmp_path / "s")


def test_model_card_names_patterns_sizes_and_provenance(tmp_path: Path) -> None:
    sdm.save(compiled(), tmp_path / "c", form="compact", provenance={"base_model": "org/base"})
    card = make_model_card(check_file(tmp_path / "c"))
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "base_model: org/base" in card
    assert '- "2:4"' in card
    assert "| 2:4 | 3 |" in card
    assert "1,602 bytes; dense ones would take 3,072" in card
    assert "sparsedm_compiler.load(path, model)" in card
