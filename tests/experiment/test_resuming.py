"""A folder holds one run: another run is refused by name and values, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsedm_compiler import ConfigError, DataError
from sparsedm_compiler.cli import main
from sparsedm_compiler.experiment import resuming
from sparsedm_compiler.experiment.resuming import MAY_DIFFER, find_reason, flatten
from sparsedm_compiler.experiment.run import describe, run
from sparsedm_compiler.experiment.run_config import RunConfig
from sparsedm_compiler.train import loop
from sparsedm_compiler.train.checkpoint import list_checkpoints
from tests.experiment.cases import VALUES, change, write_inputs
from tests.train.cases import empty_curves

PLAIN = {**VALUES, "score": {"network": None}, "sample": {**VALUES["sample"], "guidance": None}}


class Killed(BaseException):
    """Nothing in the package catches it."""


def list_files(folder: Path) -> Mapping[str, bytes | None]:
    """Returns every file with its bytes, and every folder."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, "run", a half one, "half", and their inputs."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    write_inputs(folder)
    real = loop.take_step

    def take_step(state: Any, *args: Any, **options: Any) -> Any:
        if state.progress.seen == 48:
            raise Killed
        return real(state, *args, **options)

    config = RunConfig.create(PLAIN)
    torch._dynamo.reset()
    with empty_curves():
        run(config, progress=False)
        torch._dynamo.reset()
        patch.setattr(loop, "take_step", take_step)
        with pytest.raises(Killed):
            run(change(config, out="half"), progress=False)
    assert list_checkpoints(Path("half")) == [32]
    patch.undo()
    return folder


@pytest.fixture
def config(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The configuration of the runs, in a copy of their folder; nothing can be trained there."""
    folder = tmp_path / "copy"
    shutil.copytree(runs, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(loop, "take_step", None)
    torch._dynamo.reset()
    return RunConfig.create(PLAIN)


def refuse_everywhere(config: RunConfig, *says: str) -> None:
    """Holds that a finished and a half run refuse ``config``, also previewed; nothing changes."""
    before = list_files(Path())
    for out in ("run", "half"):
        for call in (describe, run):
            with pytest.raises(ConfigError) as refusal:
                call(change(config, out=out))
            text = str(refusal.value)
            assert text.startswith(f"{out} holds a run with "), text
            assert [part for part in says if not re.search(part, text)] == [], text
            assert list_files(Path()) == before


OPTIONS: Mapping[str, tuple[Any, str]] = {
    "prune.pattern": ("2:4", r"prune\.pattern '1:4', not '2:4'"),
    "prune.policy": ("all", r"prune\.policy 'structural', not 'all'"),
    "prune.keep_dense": (["mid_block*"], r"prune\.keep_dense \[\], not \['mid_block\*'\]"),
    "prune.overrides": ({"*mlp*": "2:4"}, r"prune\.overrides {}, not {'\*mlp\*': '2:4'}"),
    "train.objective": ("v", r"train\.objective 'eps', not 'v'"),
    "train.method": ("ste", r"train\.method 'sparsedm', not 'ste'"),
    "train.images": (128, r"train\.images 64, not 128"),
    "train.batch_size": (8, r"train\.batch_size 16, not 8"),
    "train.seed": (1, r"train\.seed 0, not 1"),
    "train.mixed_precision": ("bf16", r"train\.mixed_precision 'no', not 'bf16'"),
    "data.labels": (False, r"data\.labels True, not False"),
    "data.size": (4, r"data\.size None, not 4"),
    "data.held_out_limit": (8, r"data\.held_out_limit 16, not 8"),
    "model.options": ({"depth": 3}, r"model\.options .*'depth': 0.*, not .*'depth': 3"),
}
"""A value of every kind of option that decides what is computed, and the refusal."""


@pytest.mark.parametrize("option", OPTIONS)
def test_run_with_another_option_is_refused_with_both_values(
    config: RunConfig, option: str
) -> None:
    section, name = option.split(".")
    value, says = OPTIONS[option]
    refuse_everywhere(change(config, **{section: {name: value}}), says)


def test_run_with_several_other_options_names_all_of_them(config: RunConfig) -> None:
    other = change(config, prune={"pattern": "2:4"}, train={"lr": 1.0})
    refuse_everywhere(other, r"prune\.pattern '1:4', not '2:4'; train\.lr 0\.001, not 1\.0")


def test_run_on_other_data_of_the_same_shape_is_refused(config: RunConfig) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (1437, 8, 8)).astype(np.float32)
    np.savez("other.npz", images=images, labels=np.arange(1437) % 10)
    says = r"data\.train 'digits' \(1,437 images \[1, 8, 8\]\), not 'other\.npz' \(1,437 images"
    refuse_everywhere(change(config, data={"train": "other.npz"}), says)
    says = r"data\.held_out 'digits:test' \(16 images .*, not 'other\.npz' \(16 images"
    refuse_everywhere(change(config, data={"held_out": "other.npz"}), says)
    says = r"data\.held_out 'digits:test' \(16 images .*\), not none"
    refuse_everywhere(change(config, data={"held_out": None}), says)


def test_run_from_other_weights_in_the_same_file_is_refused(config: RunConfig) -> None:
    weights = load_file("dense.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, "dense.safetensors")
    says = r"model\.weights 'dense\.safetensors' \(UViT of [\d,]+ parameters\), sha256 \w{8}, not "
    refuse_everywhere(config, says)


def test_run_with_inputs_that_were_moved_is_the_same_run(config: RunConfig) -> None:
    Path("dense.safetensors").rename("moved.safetensors")
    Path("run").rename("elsewhere")
    moved = change(config, model={"weights": "moved.safetensors"}, out="elsewhere")
    before = list_files(Path())
    assert run(moved, progress=False)["pattern"] == "1:4"
    assert list_files(Path()) == before
    assert "resumed after 32" in describe(change(moved, out="half"))


def test_run_with_options_that_may_differ_is_the_same_run(config: RunConfig) -> None:
    options = {"workers": 1, "keep": 5, "save_every": 16, "sample_every": 16, "log_every": 16}
    other = change(config, train={**options, "accumulation": 2}, prune={"backend": "inductor"})
    before = list_files(Path())
    assert run(other, progress=False) == run(config, progress=False)
    assert list_files(Path()) == before


def test_may_differ_names_options_that_exist_and_the_docs_list_them_all() -> None:
    options = flatten(RunConfig.create(PLAIN).as_dict())
    for option in MAY_DIFFER:
        section = option.removesuffix("*")
        assert any(name.startswith(section) for name in options), option
    docs = Path(resuming.__file__).parents[2] / "docs/runs.md"
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", docs.read_text(encoding="utf-8"), re.M)
    assert dict(rows) == dict(MAY_DIFFER)
    assert find_reason("prune.pattern") is None
    assert find_reason("sample.seed") == find_reason("score.count")


def test_run_in_a_folder_made_without_a_record_is_refused(config: RunConfig) -> None:
    for out in ("run", "half"):
        Path(out, "inputs.json").unlink()
        with pytest.raises(ConfigError, match="does not say which data and weights"):
            describe(change(config, out=out))


def test_run_that_dies_on_its_data_leaves_no_folder(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_step(state: Any, *_: Any, **__: Any) -> Any:
        assert Path(state.inputs.folder, "run.json").exists()
        raise DataError("image 7 cannot be read")

    monkeypatch.setattr(loop, "take_step", take_step)
    dense = change(config, train={"method": "dense", "teacher": "none", "sr_ste_lambda": 0.0})
    before = list_files(Path())
    with pytest.raises(DataError, match="image 7"):
        run(change(dense, out="runs/new"), progress=False)
    assert list_files(Path()) == before
    Path("empty").mkdir()
    with pytest.raises(DataError, match="image 7"):
        run(change(dense, out="empty"), progress=False)
    assert list_files(Path()) == {**before, "empty": None}


def test_finetune_command_refuses_another_pattern_in_one_line(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.json").write_text(json.dumps(config.as_dict()), encoding="utf-8")
    for extra in ([], ["--dry-run"]):
        status = main(["finetune", "--config", "config.json", "--pattern", "2:4", *extra])
        err = capsys.readouterr().err
        assert (status, err.count("\n")) == (2, 1)
        assert "prune.pattern '1:4', not '2:4'" in err
