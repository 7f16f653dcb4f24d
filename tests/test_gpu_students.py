"""Losses of a study beside the speeds of benchmarks/gpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.main import main
from benchmarks.gpu.quality import quality, read_losses, read_quality
from benchmarks.gpu.results import empty, save
from benchmarks.gpu.summary import summary
from tests.test_gpu_benchmark import MADE_UP


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """methods.json of a study by the clock, of three runs."""
    runs = [
        {"pattern": None, "method": "dense", "loss": 0.05},
        {"pattern": "2:4", "method": "ste", "start": "obs", "freeze": 0.5, "loss": 0.055},
        {"pattern": "2:4", "method": "asp", "loss": 0.06},
        {"pattern": "1:8", "method": "asp", "loss": 0.07},
    ]
    about = {
        "recipe": "cifar10-uvit+short-gpu",
        "data": "CIFAR",
        "commit": "abc",
        "machine": "a card",
    }
    budget = {"teacher_images": 5000, "images": 1000}
    path = tmp_path / "methods.json"
    path.write_text(json.dumps({**about, "budget": budget, "timed": runs}))
    return path


def made_up() -> dict[str, Any]:
    size = {"cols": 3072, "rows": 3072, "model": "FLUX", "layer": "proj", "act": "none"}
    layer = {"key": "FLUX proj", "tokens": 4096, **size}
    layer["patterns"] = {"2:4": {"ratio": [1.5] * 3, "kernel": "some/1", "gated": "sparse"}}
    model = {"key": "m", "model": "m", "batch": 1}
    model["patterns"] = {
        "2:4": {"ratio": [1.1, 1.2, 1.3], "kernels": {}, "wrong": False, "first_call_s": 1.0}
    }
    return {**empty(dict(MADE_UP), rehearsal=False), "ops": [layer], "models": [model]}


def test_report_with_losses_sets_each_speed_in_the_row_of_its_loss(
    study: Path, tmp_path: Path
) -> None:
    save(made_up(), tmp_path / "results.json")
    report = ["--report", str(tmp_path / "results.json"), "--losses", str(study)]
    assert main([*report, "--out", str(tmp_path)]) == 0
    said = (tmp_path / "summary.md").read_text()
    best = "ste start=obs freeze=0.5"
    assert f"| 2:4 | {best} | 0.0550 | 1.100 | 1.50 of 1 | 1.20 [1.10, 1.30] |" in said
    assert "| dense | dense | 0.0500 | 1.000 | – | – |" in said  # noqa: RUF001
    assert "| 1:8 | asp | 0.0700 | 1.400 | – | – |" in said  # noqa: RUF001
    assert said.count("loss 0.0550") == 2  # under the columns of layers and of models
    assert (
        "(cifar10-uvit+short-gpu, CIFAR, commit abc; a card): 5,000 images dense, then 1,000"
        in said
    )


def test_read_losses_without_a_dense_student_raises(study: Path) -> None:
    values = json.loads(study.read_text())
    study.write_text(json.dumps({**values, "timed": values["timed"][1:]}))
    with pytest.raises(
        ValueError, match=r"methods\.json has no dense student of a study by the clock"
    ):
        read_losses(study)


def test_read_quality_without_losses_is_that_of_the_study_in_docs(study: Path) -> None:
    results = made_up()
    assert read_quality(results) == quality()
    assert "Speed and quality" not in summary(results)
    results["quality"] = [read_losses(study)]
    assert read_quality(results).losses == {"2:4": 0.055, "1:8": 0.07}
