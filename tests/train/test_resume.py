"""A run that was interrupted ends as one that was not, and nothing is lost on the way."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsedm_compiler as sdm
from sparsedm_compiler import CheckpointError, ConfigError, SparseDMError, StoppedError
from sparsedm_compiler.diffusion import make_scheduler
from sparsedm_compiler.models import UViT
from sparsedm_compiler.train import METHODS, checkpoint, loop
from sparsedm_compiler.train.checkpoint import list_checkpoints
from sparsedm_compiler.train.folder_lock import LOCK, lock_folder
from tests.train.cases import data, log_of, short, student_of, teacher, weights

RESUMED = [name for name in METHODS if name not in ("untrained", "ste", "sr-ste")]
"""Methods to interrupt: "ste" is "progressive" in one stage, "sr-ste" "sparsedm" with no teacher.

What those two train differs by numbers alone, as test_methods.py shows.
"""


class Killed(BaseException):
    """Nothing in the package catches it."""


@cache
def whole_losses() -> tuple[float, ...]:
    """The losses of ``short`` when nothing interrupts it."""
    return short()[0].losses


def short_until(step: int, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> None:
    """``short``, killed before that step of the process."""
    real, count = loop.take_step, 0

    def counted(run: Any, pieces: Any, **given: Any) -> Any:
        nonlocal count
        count += 1
        if count > step:
            raise Killed
        return real(run, pieces, **given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", counted)
        with pytest.raises(Killed):
            short(*args, **options)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    short(out=folder)
    return folder


@pytest.fixture
def finished(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a finished run."""
    return shutil.copytree(whole_run, tmp_path / "finished")


@pytest.mark.parametrize("method", RESUMED)
def test_finetune_interrupted_and_resumed_ends_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, student = short(method, tmp_path / "whole")
    # Checkpoints lie every third step; the stages of staged methods change at the sixth.
    for step in (2, 4, 3, 1) if method in ("sparsedm", "progressive", "transfer") else (2, 4):
        short_until(step, monkeypatch, method, tmp_path / "parts")
    again, resumed = short(method, tmp_path / "parts")
    assert all(map(torch.equal, weights(student), weights(resumed)))
    assert whole.ema is not None
    assert again.ema is not None
    assert all(map(torch.equal, weights(whole.ema), weights(again.ema)))
    assert again.losses == whole.losses
    assert again.held_out == whole.held_out
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_finetune_of_a_finished_run_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = short(out=tmp_path)
    monkeypatch.setattr(loop, "take_step", None)
    again, student = short(out=tmp_path)
    assert (again.losses, again.held_out) == (first.losses, first.held_out)
    loaded = sdm.load(tmp_path / "student.safetensors", teacher())
    assert again.ema is not None
    assert all(map(torch.equal, weights(loaded), weights(again.ema)))
    last = sdm.load(tmp_path / "checkpoints/000000000096/student.safetensors", teacher())
    assert all(map(torch.equal, weights(last), weights(student)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_finetune_stopped_by_a_signal_saves_and_raises(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = loop.take_step, signal.getsignal(number)

    def step(run: Any, pieces: Any, **given: Any) -> Any:
        if run.progress.seen == 32:
            os.kill(os.getpid(), number)
        return real(run, pieces, **given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", step)
        with pytest.raises(StoppedError, match="stopped after 40 of 96 images"):
            short(out=tmp_path)
    assert signal.getsignal(number) == before
    assert list_checkpoints(tmp_path) == [24, 40]
    assert short(out=tmp_path)[0].losses == whole_losses()


@pytest.mark.parametrize(
    ("averages", "kept"), [((5, 4, 3, 2, 1), [96]), ((5, 3, 1, 2, 4), [48, 96])]
)
def test_save_run_keeps_the_last_and_the_best_checkpoint(
    averages: tuple[int, ...], kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = (float(loss) for average in averages for loss in (10 - average, average))
    monkeypatch.setattr(loop, "held_out_loss", lambda *_, **__: next(found))
    short(out=tmp_path, keep=1)
    assert list_checkpoints(tmp_path) == kept


def refuse(folder: Path, says: str, **options: Any) -> None:
    """Holds that ``short`` with these options is refused by ``folder``, which stays as it is."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=says):
        short(out=folder, **options)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_with_another_config_raises(finished: Path) -> None:
    refuse(finished, r"a run with lr 0\.01, not 0\.02; seed 0, not 1: resume", lr=0.02, seed=1)
    short(out=finished, keep=5, workers=1)


def test_resume_of_a_folder_made_before_an_option_came_takes_its_default(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    short(out=folder)
    options = json.loads((folder / "config.json").read_text())
    old = {name: value for name, value in options.items() if name != "mask_every"}
    (folder / "config.json").write_text(json.dumps(old))
    assert short(out=folder)[0].losses
    refuse(folder, "a run with mask_every 1, not 2", mask_every=2)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is damaged"):
        short(out=folder)


def test_resume_with_other_inputs_raises(finished: Path) -> None:
    images, labels = data()
    refuse(finished, r"data 40 images \[1, 4, 4\], not 39 images", data=(images[1:], labels[1:]))
    says = r"data 40 images \[1, 4, 4\], sha256 \w{8}, not \w{8}"
    refuse(finished, says, data=(images + 1, labels))
    refuse(finished, says, data=(images, labels.flip(0)))
    refuse(finished, r"held_out 8 images .*, not none", held_out=None)
    refuse(finished, r"teacher UViT of .* parameters, sha256 \w{8}, not", teacher=teacher(seed=1))
    scheduler = make_scheduler("ddpm", "eps")
    refuse(finished, "scheduler none, not DDPMScheduler", scheduler=scheduler)
    student = student_of(teacher())
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    refuse(finished, "optimizer none, not SGD", student=student, optimizer=optimizer)


def test_resume_without_a_teacher_compares_the_weights_of_the_student(tmp_path: Path) -> None:
    short("ste", tmp_path)
    other = student_of(teacher(seed=1))
    refuse(tmp_path, r"student UViT .*sha256 \w{8}, not \w{8}", method="ste", student=other)


def test_resume_with_a_student_masked_otherwise_raises(finished: Path) -> None:
    other = sdm.compile(teacher(), pattern="2:4", backend="eager")
    refuse(finished, "pattern 1:4, not 2:4", student=other)
    other = sdm.compile(teacher(), pattern="1:4", keep_dense=["mid_block"], backend="eager")
    refuse(finished, r"mid_block.*\.weight 1:4, not dense: compile the student", student=other)


def test_finetune_into_a_folder_that_another_thread_writes_raises(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, lock_folder(tmp_path / "run"):
        call = pool.submit(short, "dense", tmp_path / "run")
        with pytest.raises(ConfigError, match=rf"being written by process {os.getpid()} on "):
            call.result()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert not (tmp_path / "run").exists()
    short("dense", tmp_path / "run")


def test_resume_with_another_model_raises(finished: Path) -> None:
    wide = UViT(img_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=4)
    with pytest.raises(CheckpointError, match="does not fit this UViT"):
        short(out=finished, student=sdm.compile(wide, pattern="1:4", backend="eager"))


def test_resume_after_a_kill_during_a_save_ignores_the_torn_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.write_text

    def write_text(path: Path, text: str) -> None:
        if path.name == "state.json" and path.parent.name.startswith("000000000048"):
            real(path, text[: len(text) // 2])
            raise Killed
        real(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_text", write_text)
        with pytest.raises(Killed):
            short(out=tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["000000000024", "000000000048.part"]
    assert short(out=tmp_path)[0].losses == whole_losses()
    assert not [*(tmp_path / "checkpoints").glob("*.part")]


def test_save_run_on_a_full_disk_raises_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save_file

    def save_file(tensors: Any, path: Path, meta: Any) -> None:
        if "000000000072" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, meta)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        with pytest.raises(CheckpointError, match=r"the disk is full.*same command again"):
            short(out=tmp_path)
    assert list_checkpoints(tmp_path) == [24, 48]
    assert short(out=tmp_path)[0].losses == whole_losses()


def test_resume_from_a_damaged_checkpoint_names_its_folder(tmp_path: Path) -> None:
    short(out=tmp_path)
    file = tmp_path / "checkpoints/000000000096/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"000000000096.*remove that folder"):
        short(out=tmp_path)


def test_finetune_with_a_nan_loss_keeps_a_good_checkpoint(tmp_path: Path) -> None:
    images, labels = data()
    whole = short(out=tmp_path / "good")[0]

    class Poisoned(torch.utils.data.Dataset[Any]):
        """Its 50th fetch is NaN."""

        count = 0

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, number: int) -> Any:
            Poisoned.count += 1
            return images[number] * (math.nan if Poisoned.count == 50 else 1), labels[number]

    model = teacher()
    student = sdm.compile(model, pattern="1:4", backend="eager")
    with pytest.raises(SparseDMError, match=r"loss is nan after 48 images.*is from before"):
        sdm.finetune(
            student, model, Poisoned(), config=whole.config, out=tmp_path / "bad", progress=False
        )
    assert list_checkpoints(tmp_path / "bad") == [24, 48]
    for path in (tmp_path / "bad/checkpoints").glob("*/student.safetensors"):
        sdm.load(path, teacher())


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    short(out=tmp_path)
    suffixes = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_flatten_state_and_unflatten_state_are_inverse() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"betas": (0.9, 1), "x": None}]}
    plain = json.loads(json.dumps(checkpoint.flatten_state(state, "o", tensors)))
    back = checkpoint.unflatten_state(plain, tensors)
    assert back == state
    assert isinstance(back["groups"][0]["betas"], tuple)
    with pytest.raises(CheckpointError, match="keeps a set"):
        checkpoint.flatten_state({"a": {1}}, "o", {})
