"""The study on one device within a budget of minutes, rehearsed on a CPU; and its classifier."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.study import plan, timed
from benchmarks.study.plan import LARGE, QUICK, Study
from benchmarks.study.resnet56 import Block, ResNet56, load_resnet56, make_resnet_features
from benchmarks.study.run import is_done, run_folder
from benchmarks.study.setting import Setting
from sparsedm_compiler.errors import ConfigError
from sparsedm_compiler.train import FinetuneConfig

RECIPE = "cifar10-uvit+short-gpu"
TOY = replace(QUICK, width=16, depth=0, held_out=16, steps=2, settled=(), blocks=("1:4",))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study by the clock of three rows: dense, obs-distill and asp at 1:4."""
    pytest.importorskip("sklearn")
    return Study("digits", "digits:test", None, tmp_path, TOY, recipe=RECIPE, precision="bf16")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # DPM-Solver
def test_timed_study_writes_whole_results_and_goes_on_with_the_same_images(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timed, "measure_rate", lambda study: 0.1)  # two batches, however slow
    rows = [Setting("timed", "ste", "1:4", 0, {"freeze": 0.5})]
    monkeypatch.setattr(plan, "list_timed_runs", lambda budget: iter(rows))
    assert timed.run_timed(study, 10) == 0
    said = capsys.readouterr().out
    images = json.loads((study.out / "plan.json").read_text())
    assert (images["teacher_images"], images["images"]) == (256, 256)
    for setting in rows:
        assert is_done(study, setting)
        values = json.loads((run_folder(study, setting) / "results.json").read_text())
        assert values["images"] == 256
        assert values["config"]["mixed_precision"] == "bf16"
        assert values["scores"][0]["network"] == "SmallResNet"
        assert not (run_folder(study, setting) / "checkpoints").exists()
    assert "[1/1] ste-1_4-seed0-freeze=0.5: done" in said
    table = (study.out / "methods.md").read_text()
    assert "ste, freeze=0.5" in table
    assert "FD (dense" in table
    monkeypatch.setattr(timed, "measure_rate", lambda study: pytest.fail("it measured again"))
    monkeypatch.setattr(timed, "attempt", lambda task: pytest.fail("it trained again"))
    assert timed.run_timed(study, 1) == 0


def test_timed_study_when_time_is_up_leaves_out_the_last_runs_and_says_which(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    trained: list[str] = []

    def attempt(task: tuple[Study, Setting]) -> tuple[str, str | None]:
        now[0] += 60
        trained.append(task[1].method)
        return task[1].name, None

    monkeypatch.setattr(timed, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(timed, "attempt", attempt)
    for name in ("prepare_study", "write_tables", "tidy_up", "score_teacher"):
        monkeypatch.setattr(timed, name, lambda *_, **__: None)
    monkeypatch.setattr(timed, "measure_rate", lambda study: 100.0)
    timed.run_timed(study, 2.5)  # 135 s to plan with
    assert trained == ["dense", "obs-distill"]
    assert "no time is left for asp-1_4-seed0; the same command goes on" in capsys.readouterr().out
    images = json.loads((study.out / "plan.json").read_text())
    batch = 128
    assert images["teacher_images"] == int(timed.TEACHER * 135 * 100 / batch) * batch
    assert images["images"] == int(135 / 3 * 100 / timed.SLOWER / batch) * batch


def test_options_of_a_recipe_leave_every_method_as_it_is(tmp_path: Path) -> None:
    study = Study("x", "y", None, tmp_path, LARGE, recipe=RECIPE, precision="bf16")
    for method, lam in (("sparsedm", 2e-4), ("ste", 0.0), ("obs-distill", 0.0)):
        options = study.make_student_options(Setting("timed", method, "2:4", 1, {"freeze": 0.5}))
        config = FinetuneConfig.create(**{**options, "images": 128})
        assert (config.sr_ste_lambda, config.lr, config.batch_size) == (lam, 5e-4, 128)
        assert (config.mixed_precision, config.seed, config.freeze) == ("bf16", 1, 0.5)
        usual = FinetuneConfig.create(method)
        assert (config.alpha, config.beta) == (usual.alpha, usual.beta)
    teacher = replace(study, budget=replace(LARGE, teacher_images=2000)).make_teacher_options()
    assert (teacher["method"], teacher["images"], teacher["warmup_images"]) == ("dense", 2000, 100)


def test_large_study_trains_the_published_model_without_classes(tmp_path: Path) -> None:
    study = Study("x", "y", None, tmp_path, LARGE, device="meta", recipe=RECIPE)
    model = study.make_model()
    assert (model.config.embed_dim, model.config.depth, model.config.num_classes) == (512, 12, 0)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_resnet56_when_weights_are_published_ones_has_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ResNet56()
    names = network.state_dict()
    assert len(names) == 55 * 6 + 2  # conv and five of its norm, 55 times; the classifier
    assert names["layer2.0.conv1.weight"].shape == (32, 16, 3, 3)
    path = tmp_path / "resnet56.th"
    torch.save({"state_dict": {f"module.{name}": value for name, value in names.items()}}, path)
    loaded = load_resnet56(path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    features: Any = make_resnet_features(loaded)
    assert features.name == "ResNet56"
    torch.testing.assert_close(features.network(images), network.eval().features(images))
    assert features.network(images).shape == (2, 64)
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(1)}}, path)
    with pytest.raises(ConfigError, match=r"resnet56\.th does not hold the weights"):
        load_resnet56(path)


def test_shortcut_of_resnet56_takes_every_second_pixel_and_pads_channels() -> None:
    block = Block(4, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()
