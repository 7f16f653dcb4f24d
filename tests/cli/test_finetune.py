"""``sparsedm finetune``: its configuration, its run, and the same command again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsedm_compiler as sdm
from sparsedm_compiler.cli import finetune
from sparsedm_compiler.experiment.run_config import RunConfig
from sparsedm_compiler.models import open_model
from tests.cli.conftest import Shell

YAML = """
model: {name: "own:net", options: {num_classes: 10}}
data: {train: digits, held_out: "digits:test", held_out_limit: 20}
prune: {pattern: 2:4, backend: eager}
train: {images: 128, batch_size: 64, lr: 1e-3, log_every: 64}
sample: {sampler: ddim, steps: 2, grid: 4}
score: {network: "own:pixels", count: 70}
out: runs/a
"""


@pytest.fixture
def config(shell: Shell) -> str:
    (shell.folder / "run.yaml").write_text(YAML)
    return "run.yaml"


def read(*argv: str) -> RunConfig:
    parser = argparse.ArgumentParser()
    finetune.add_options(parser)
    return finetune.build_config(parser.parse_args(argv))


def test_build_config_lets_later_options_win(config: str) -> None:
    assert read("--config", config).train.lr == 1e-3
    config_read = read(
        "--config", config, "--set", "train.lr=5e-4", "--set", "train.betas=[0.9, 0.99]"
    )
    assert (config_read.train.lr, config_read.train.betas) == (5e-4, (0.9, 0.99))
    short = ("--pattern", "1:8", "--method", "ste", "--data", "other", "--out", "b", "--seed", "3")
    config_read = read(
        "--config", config, *short, "--held-out", "x", "--model", "m:f", "--weights", "w"
    )
    assert (config_read.prune.pattern, config_read.train.method, config_read.train.seed) == (
        "1:8",
        "ste",
        3,
    )
    assert (config_read.data.train, config_read.data.held_out, config_read.out) == (
        "other",
        "x",
        "b",
    )
    assert (config_read.model.name, config_read.model.weights) == ("m:f", "w")
    assert read("--config", config, "--out", "1").out == "1"
    assert read("--config", config, "--out", "b", "--set", "out=c").out == "c"


def test_build_config_puts_the_recipe_below_all_other_options(config: str) -> None:
    config_read = read("--config", config, "--recipe", "cifar10-uvit")
    assert (config_read.prune.policy, config_read.train.flip) == ("uvit", True)
    assert (config_read.train.images, config_read.model.name) == (128, "own:net")
    short = ("--data", "d", "--out", "o", "--weights", "w")
    config_read = read("--recipe", "cifar10-uvit", *short)
    assert (config_read.model.name, config_read.train.images) == ("uvit-cifar10-small", 64_000_000)


def test_finetune_trains_scores_and_does_not_repeat_a_finished_run(
    shell: Shell, config: str
) -> None:
    torch._dynamo.reset()
    command = ("finetune", "--config", config)
    result = shell(*command)
    assert result.status == 0, result.err
    speed, loss, score, wrote = result.out.splitlines()[-4:]
    results: dict[str, Any] = json.loads(Path("runs/a/results.json").read_text())
    assert (results["images"], results["pattern"]) == (128, "2:4")
    assert loss.startswith(f"held-out loss {results['held_out'][-1]['student']:.4f}, of the EMA")
    assert speed.startswith(f"{results['images_per_second']:.3g} images/s; ")
    assert score == f"FD-pixels {results['scores'][0]['value']:.4g}"
    assert wrote == "wrote runs/a; compare runs with: sparsedm report runs/a"
    dense = open_model("own:net", options={"num_classes": 10})
    student = sdm.load("runs/a/student.safetensors", dense, backend="eager")
    assert not torch.equal(student.mid_block.mlp.fc1.weight, dense.mid_block.mlp.fc1.weight)
    assert shell("report", "runs/a").status == 0
    before = shell.listing()
    again = shell(*command)  # a finished run is not trained again
    assert again.out.splitlines()[-3:] == result.out.splitlines()[-3:]
    assert shell.listing() == before


def test_finetune_dry_run_opens_model_and_data(shell: Shell, config: str) -> None:
    result = shell.dry("finetune", "--config", config)
    for part in ("own:net", "sparsedm: SR-STE", "pattern    2:4", "1,437 images", "runs/a"):
        assert part in result.out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--config", "gone.yaml"], "cannot read the configuration gone.yaml"),
        (["--set", "train.lrr=1"], "finetune has no option 'lrr'; did you mean lr"),
        (["--set", "nonsense"], "'nonsense' is not section.name=value"),
        (["--set", "other.x=1"], "there is no section 'other'"),
        (["--method", "magic"], "method 'magic' is none of"),
        (["--pattern", "4:2"], "pattern '4:2' is not 'n:m'"),
        (["--recipe", "cake"], "there is no recipe 'cake'"),
        (["--set", "sample.steps=5000"], "as it has 1000 noise levels: lower sample.steps"),
        (["--set", "sample.grid=0"], "sample.grid 0 is not >= 1"),
        (["--set", "sample.guidance=2"], "sample.guidance 2 needs train.null_label"),
        (["--set", "train.betas=[2, 3]"], "betas [2, 3] of a fine-tune are not in [0, 1)"),
        (["--seed", str(2**64)], "seed 18446744073709551616 of a fine-tune is not from -2^63"),
        (["--out", "own.py"], "cannot write own.py: it is a file, name a folder"),
        (["--model", "UViT", "--set", "train.images=1"], "has random weights"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_finetune_of_an_invalid_request_is_refused(
    shell: Shell, config: str, argv: list[str], says: str
) -> None:
    for ask in (shell, shell.dry):
        assert says in ask("finetune", "--config", config, *argv).reason


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--weights", "gone.pth"], "cannot read weights from gone.pth"),
        (["--data", "gone"], "'gone' does not exist"),
        (["--held-out", "gone"], "'gone' does not exist"),
        (["--model", "own:nothing"], "cannot import 'own:nothing'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_finetune_dry_run_refuses_missing_inputs(
    shell: Shell, config: str, argv: list[str], says: str
) -> None:
    assert says in shell.dry("finetune", "--config", config, *argv).reason


def test_finetune_without_options_asks_for_the_folder(shell: Shell) -> None:
    assert "no folder to write to: set out" in shell("finetune").reason


def test_finetune_of_adapters_alone_leaves_a_student_that_opens(config: str, shell: Shell) -> None:
    result = shell("finetune", "--config", config, "--set", "train.only=lora")
    assert result.status == 0, result.err
    dense = open_model("own:net", options={"num_classes": 10})
    student = sdm.load("runs/a/student.safetensors", dense, backend="eager")
    weight = student.get_parameter("mid_block.attn.qkv.weight")
    assert weight.count_nonzero() * 2 <= weight.numel()
    assert torch.equal(student.get_parameter("pos_embed"), dense.get_parameter("pos_embed"))
    assert json.loads(Path("runs/a/results.json").read_text())["complete"]
