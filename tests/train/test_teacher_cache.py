"""Teacher outputs on the disk: later runs are the same to the bit and need no teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, DataError
from sparsedm_compiler.data.row_cache import read_cache
from sparsedm_compiler.models import UViT
from sparsedm_compiler.train import FinetuneConfig, fingerprints, teacher_cache
from tests.group import run_group
from tests.train.cases import CLASSES, data, short, student_of, teacher, weights

OPTIONS: dict[str, Any] = {"images": 32, "held_out": None, "held_out_every": None}


def count_calls(model: nn.Module) -> list[int]:
    """The batch sizes of all calls of a model from now on."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def train(**options: Any) -> tuple[list[Tensor], tuple[float, ...]]:
    """Weights and losses of a short run."""
    student = student_of(
        teacher(), options.get("method", "sparsedm")
    )  # not a copy of a watched one
    result, student = short(**{**OPTIONS, "student": student, **options})
    return weights(student), result.losses


def train_alone(folder: Path, **options: Any) -> tuple[float, ...]:
    """The losses of a run that has the cache and no teacher."""
    given: dict[str, Any] = {
        "batch_size": 8,
        "lr": 1e-2,
        "flip": True,
        "drop_condition": 0.2,
        "null_label": CLASSES,
        "max_grad_norm": 0.5,
        "progress": False,
        "images": 32,
        "teacher_cache": folder,
        **options,
    }
    return sdm.finetune(student_of(teacher()), None, data(), **given).losses


def test_run_that_writes_and_runs_that_read_equal_one_without_a_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    plain, losses = train()
    first, first_losses = train(teacher_cache=folder)
    model = teacher()
    calls = count_calls(model)
    second, second_losses = train(teacher=model, teacher_cache=str(folder))
    assert calls == [1, 1, 1]  # the first image, with and without its condition, and as kept
    assert losses == first_losses == second_losses == train_alone(folder)
    assert all(map(torch.equal, plain, first))
    assert all(map(torch.equal, plain, second))
    other, _ = train(teacher_cache=folder, lr=1e-3, sr_ste_lambda=0.0)
    assert not all(map(torch.equal, plain, other))


def test_longer_run_computes_what_is_missing_and_a_lost_row_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    train(teacher_cache=folder)
    model = teacher()
    calls = count_calls(model)
    losses = train(teacher=model, teacher_cache=folder, images=40)[1]
    assert calls == [1, 1, 1, 8]
    assert losses == train(images=40)[1]
    part = folder / "000000000000.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1  # of the last of 32 rows
    part.write_bytes(content)
    with pytest.raises(ConfigError, match="has lost outputs from image"):
        train_alone(folder)


def test_outputs_of_bfloat16_are_used_as_they_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    options: dict[str, Any] = {"teacher_dtype": "bf16"}
    plain = train(**options)[1]
    assert train(teacher_cache=folder, **options)[1] == plain == train_alone(folder, **options)
    assert plain != train()[1]
    cache = read_cache(folder)
    assert cache is not None
    assert cache.row_bytes == 2 * 16


def test_cache_of_another_teacher_data_or_option_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    train(teacher_cache=folder)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.iterdir())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher": teacher(1)}, "outputs with teacher UViT of .* parameters, sha256"),
        ({"data": data(39)}, "outputs with data 40 images"),
        ({"seed": 1}, "outputs with seed 0, not 1"),
        ({"objective": "flow"}, "outputs with objective 'eps', not 'flow'"),
        ({"drop_condition": 0.1}, "outputs with drop_condition 0.2, not 0.1"),
        ({"teacher_dtype": "fp16"}, "outputs with teacher_dtype 'fp32', not 'fp16'"),
    ]
    for options, says in cases:
        with pytest.raises(ConfigError, match=says):
            train(teacher_cache=folder, **options)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.iterdir()) == before


def test_run_without_a_teacher_needs_all_outputs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty: give the teacher"):
        train_alone(tmp_path / "cache")
    train(teacher_cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="lacks 8 of the 40 outputs that are due"):
        train_alone(tmp_path / "cache", images=40)


def test_run_in_a_folder_is_resumed_with_or_without_its_teacher(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options: dict[str, Any] = {"save_every": 16}
    whole = train(out=tmp_path / "run", teacher_cache=cache, **options)[1]
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    for path in (*last.iterdir(), tmp_path / "run" / "results.json"):
        path.unlink()
    last.rmdir()
    again = train_alone(cache, out=tmp_path / "run", **options)
    assert again == whole


def test_cache_that_does_not_fit_on_the_disk_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "get_free_bytes", lambda folder: 100)
    says = r"needs 2.5 kB more for 32 images in float32, and 100 B are free: choose another folder"
    with pytest.raises(ConfigError, match=says):
        train(teacher_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_size_of_the_cache_is_said_before_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(teacher_cache=tmp_path / "cache", progress=True)
    said = capsys.readouterr().out
    assert f"teacher cache {tmp_path / 'cache'}: outputs for 32 images, 2.5 kB; 0 are there" in said


def test_cache_with_options_and_data_that_it_does_not_fit_is_refused(tmp_path: Path) -> None:
    for options in ({"method": "ste"}, {"method": "transfer"}, {"beta": 0.0}):
        with pytest.raises(ConfigError, match="teacher_cache keeps the outputs of a dense teacher"):
            FinetuneConfig.create(**options, teacher_cache="x")
    with pytest.raises(ConfigError, match="a TensorDataset may draw images at random"):
        train(data=TensorDataset(*data()), teacher_cache=tmp_path / "cache")


def train_together(rank: int, folder: Path) -> None:
    """One of two processes fills the cache, then both read it."""
    model = teacher()
    losses = [train(teacher_cache=folder / "cache", accumulation=2)[1]]
    calls = count_calls(model)
    losses.append(train(teacher=model, teacher_cache=folder / "cache", accumulation=2)[1])
    assert calls == [1, 1, 1]
    if rank == 0:
        torch.save(losses, folder / "losses.pt")


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    run_group(train_together, tmp_path)
    first, second = torch.load(tmp_path / "losses.pt")
    assert first == second
    assert first == pytest.approx(train()[1], rel=1e-5)
    cache = read_cache(tmp_path / "cache")
    assert cache is not None
    assert cache.count_missing(0, 32) == 0


def test_outputs_of_a_pruned_teacher_when_it_has_the_weights_of_a_dense_one_are_told_apart(
    tmp_path: Path,
) -> None:
    train(teacher_cache=tmp_path / "cache")
    pruned = sdm.compile(teacher(), "1:4", backend="eager")
    with pytest.raises(ConfigError, match=r"with teacher settings none, not \{'pattern': '1:4'\}"):
        train(teacher=pruned, teacher_cache=tmp_path / "cache")
    train(teacher=pruned, teacher_cache=tmp_path / "other")
    train_alone(tmp_path / "other")  # without a teacher: that of the record


def run_meanwhile(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Lets a run go to its end between the next one's look at its new cache and its first write."""
    own = teacher_cache.check_room

    def check_room(*args: Any) -> None:
        monkeypatch.setattr(teacher_cache, "check_room", own)
        own(*args)
        train(**options)

    monkeypatch.setattr(teacher_cache, "check_room", check_room)


def test_two_runs_when_they_start_in_one_new_cache_share_it_or_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = ({"images": 16, "teacher_cache": tmp_path / name} for name in ("one", "two"))
    losses = train(images=16)[1]
    run_meanwhile(monkeypatch, **{**one, "images": 8})
    assert train(**one)[1] == losses  # its parts would have been larger
    cache = read_cache(tmp_path / "one")
    assert cache is not None
    assert (cache.per_part, cache.count_missing(0, 16)) == (8, 0)
    run_meanwhile(monkeypatch, **two)
    with pytest.raises(ConfigError, match="outputs with seed 0, not 1"):
        train(**two, seed=1)
    assert train(**two)[1] == losses


def test_teacher_and_data_of_a_run_with_a_folder_are_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    for module in (fingerprints, teacher_cache):
        for name in ("fingerprint_weights", "fingerprint_data"):
            own = vars(module)[name]
            monkeypatch.setattr(module, name, lambda *a, o=own, n=name: hashed.append(n) or o(*a))
    train(out=tmp_path / "run", teacher_cache=tmp_path / "cache")
    assert sorted(hashed) == ["fingerprint_data", "fingerprint_weights"]


def test_teacher_cache_when_its_record_is_lost_or_damaged_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    train(teacher_cache=folder)
    record = folder / "cache.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "about": {"teacher": {"colour": 1}}}))
    with pytest.raises(DataError, match="is damaged"):
        train(teacher_cache=folder)
    record.unlink()
    with pytest.raises(DataError, match=r"holds rows without cache\.json"):
        train(teacher_cache=folder)


@pytest.mark.parametrize("folder", [5, ""])
def test_teacher_cache_when_it_is_no_path_is_refused(folder: Any) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        FinetuneConfig(teacher_cache=folder)


def test_teacher_of_the_same_weights_and_other_code_is_told_apart(tmp_path: Path) -> None:
    class Doubled(UViT):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    train(teacher_cache=tmp_path / "cache")
    changed = teacher()
    changed.__class__ = Doubled
    with pytest.raises(ConfigError, match="other outputs than this teacher computes"):
        train(teacher=changed, teacher_cache=tmp_path / "cache")
