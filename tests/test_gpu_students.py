"""The section "quality" of benchmarks/gpu: equal budgets, masks that hold, losses in the report."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.case import DATA, HELD_OUT
from benchmarks.gpu.plan import TINY
from benchmarks.gpu.quality import quality, read_quality
from benchmarks.gpu.results import empty
from benchmarks.gpu.students import Trainer, compare, measure_kept, open_images, schedule
from benchmarks.gpu.summary import summary
from sparsedm_compiler.models import UViT

MADE_UP = {"gpu": "made up", "commit": "none", "card": None, "time": "never"}
MADE_UP |= dict.fromkeys(("torch", "cuda", "cusparselt", "triton"), "0")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve images to train on and four others, as the environment names them."""
    draw = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    np.savez(
        path,
        train_images=draw.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8),
        test_images=draw.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8),
    )
    monkeypatch.setenv(DATA, str(path))
    monkeypatch.delenv(HELD_OUT, raising=False)
    return path


def plan(seconds: float = 600.0) -> Any:
    small = replace(TINY.students, most_images=160)
    return replace(TINY, until=time.time() + seconds, students=small)


@pytest.mark.usefixtures("archive")
def test_students_see_equal_budgets_and_keep_their_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[tuple[int, int]] = []
    train = Trainer.train

    def note(self: Trainer, images: int, seed: int, masks: Any = None) -> None:
        trained.append((images, seed))
        train(self, images, seed, masks)

    monkeypatch.setattr(Trainer, "train", note)
    rows = list(compare(plan(), frozenset({"1:2@64x16"}), lambda note: None))
    row = rows[-1]
    assert [*row["patterns"]] == ["dense", *TINY.students.patterns]
    assert row["patterns"]["2:4"]["kept"] == 0.5
    assert row["patterns"]["dense"]["kept"] == 1.0
    assert row["patterns"]["1:2@64x16"] == {"refused": "the process died of it"}
    assert row["patterns"]["2:4"]["loss"] > 0
    assert row["images"] == 32
    assert row["teacher_images"] + 3 * row["images"] <= 160
    assert [pair for pair in trained if pair[1]] == [
        (row["teacher_images"], 1),
        (row["images"], 2),
        (row["images"], 2),
    ]
    assert row["data"] == "images.npz, 12 images"
    assert row["held_out"] == 4


@pytest.mark.usefixtures("archive")
def test_budget_without_time_is_one_step_each(monkeypatch: pytest.MonkeyPatch) -> None:
    late = plan(seconds=-1)
    model = UViT(img_size=8, embed_dim=128, depth=2, num_heads=2)
    budget = Trainer(model, open_images(late), late).plan_budget()
    assert budget == {"teacher_images": 8, "images": 8}


def test_pruned_weight_that_moved_is_an_error() -> None:
    model = torch.nn.Linear(4, 4)
    mask = {"weight": torch.eye(4)}
    with pytest.raises(RuntimeError, match="a pruned weight has moved"):
        measure_kept(model, mask)
    with torch.no_grad():
        model.weight.mul_(mask["weight"])
    assert measure_kept(model, mask) == 0.25


def test_images_that_are_not_there_refuse_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, "nowhere.npz")
    (row,) = compare(plan(), frozenset(), lambda note: None)
    assert "nowhere.npz" in row["refused"]
    results = {**empty(dict(MADE_UP), rehearsal=False), "quality": [row]}
    assert f"No students were trained: {row['refused']}" in summary(results)


def test_schedule_warms_up_and_ends_at_zero() -> None:
    assert schedule(0.025) == pytest.approx(0.5, abs=0.01)
    assert schedule(1.0) == pytest.approx(0.0)


def made_up() -> dict[str, Any]:
    cells = {"dense": {"loss": 0.05}, "2:4": {"loss": 0.055}, "1:8": {"refused": "no"}}
    about = {"width": 512, "depth": 4, "parameters": 17_000_000, "data": "CIFAR", "images": 1000}
    row = {"key": "students", **about, "teacher_images": 5000, "teacher_loss": 0.051}
    size = {"cols": 3072, "rows": 3072, "model": "FLUX", "layer": "proj", "act": "none"}
    layer = {"key": "FLUX proj", "tokens": 4096, **size}
    layer["patterns"] = {"2:4": {"ratio": [1.5] * 3, "kernel": "some/1", "gated": "sparse"}}
    model = {"key": "m", "model": "m", "batch": 1, "dense_first_call_s": 1.0}
    model["patterns"] = {
        "2:4": {"ratio": [1.1, 1.2, 1.3], "kernels": {}, "wrong": False, "first_call_s": 1.0}
    }
    found = empty(dict(MADE_UP), rehearsal=False)
    return {**found, "quality": [{**row, "patterns": cells}], "ops": [layer], "models": [model]}


def test_report_sets_each_speed_in_the_row_of_its_loss() -> None:
    said = summary(made_up())
    assert "| 2:4 | 0.0550 | 1.100 | 1.50 of 1 | 1.20 [1.10, 1.30] |" in said
    assert "| dense | 0.0500 | 1.000 | – | – |" in said  # noqa: RUF001
    assert "| 1:8 | – | – | – | – |" in said  # noqa: RUF001
    assert said.count("loss 0.0550") == 2  # under the columns of layers and of models
    assert "5,000 images dense (loss 0.0510), then 1,000 for each student" in said


def test_losses_of_a_rehearsal_stand_beside_no_speed() -> None:
    results = {**made_up(), "rehearsal": True}
    assert read_quality(results) == quality()
    assert read_quality(made_up()).losses == {"2:4": 0.055}
    assert read_quality(empty(dict(MADE_UP), rehearsal=False)) == quality()
    assert "| 2:4 | ran | – | – | ran |" in summary(results)  # noqa: RUF001
