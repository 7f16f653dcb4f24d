"""Explain: the saved decisions, the kernels, the MACs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence

import pytest
import torch

import sparsedm_compiler as sdm
from tests.cli.conftest import Shell, student

EXPLAIN = ("explain", "student.safetensors", "--model", "own:net", "--backend", "eager")


def test_the_saved_decisions_are_shown(shell: Shell, weights: Sequence[str]) -> None:
    said = shell(*EXPLAIN, "--mode", "train")
    made = student()
    assert said.out == f"{sdm.explain(made)}\n"
    assert "mid_block.attn.qkv.weight" in said.out
    assert "dense: first op of the graph" in said.out


def test_in_mode_infer_every_weight_has_its_kernel(shell: Shell, weights: Sequence[str]) -> None:
    said = shell(*EXPLAIN)
    assert "mode 'infer', compiled by 'eager'" in said.out
    assert "folded weights: " in said.out


def test_macs_count_what_was_pruned(shell: Shell) -> None:
    made = sdm.compile(
        student().float(),
        "1:8",
        keep_dense=["mid_block"],
        overrides={"*.fc1": "2:4"},
        backend="eager",
    )
    args = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    made(*args)
    sdm.save(made, shell.folder / "student.safetensors")
    said = shell(*EXPLAIN, "--mode", "train", "--macs")
    given = {"keep_dense": ["mid_block"], "overrides": {"*.fc1": "2:4"}}
    expected = sdm.count_macs(student(), *args, pattern="1:8", **given)
    assert said.out == f"{sdm.explain(made)}\n\n{expected}\n"


def test_the_folder_of_a_run_brings_its_model(shell: Shell, weights: Sequence[str]) -> None:
    values = {"model": {"name": "own:net"}, "data": {"train": "digits"}, "out": "runs/a"}
    (shell.folder / "runs/a").mkdir(parents=True)
    (shell.folder / "runs/a/run.json").write_text(json.dumps(values), encoding="utf-8")
    assert "runs/a has no student.safetensors" in shell("explain", "runs/a").reason
    shutil.copy("student.safetensors", "runs/a")
    asked = ("--mode", "train", "--backend", "eager")
    assert shell("explain", "runs/a", *asked).out == shell(*EXPLAIN, "--mode", "train").out
    for ask in (shell, shell.dry):
        said = ask("explain", "student.safetensors")
        assert "student.safetensors is not the folder of a run: give --model too" in said.reason


def test_a_dry_run_names_the_file(shell: Shell, weights: Sequence[str]) -> None:
    said = shell.dry(*EXPLAIN)
    assert said.out.splitlines()[0] == (
        "would explain own:net with weights student.safetensors, masked to 2:4, mode infer, on cpu"
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["dense.safetensors", "--model", "own:net"], "holds no pruned model"),
        (["gone.safetensors", "--model", "own:net"], "cannot read weights from gone.safetensors"),
        (["own.py", "--model", "own:net"], "cannot read weights from own.py"),
        (["student.safetensors", "--model", "own:halves"], "does not fit this Halves; missing: "),
        (["student.safetensors", "--model", "own:net", "--option", "depth=4"], "missing: in_blo"),
    ],
    ids=["dense", "gone", "noise", "class", "depth"],
)
def test_bad_requests(shell: Shell, weights: Sequence[str], argv: list[str], says: str) -> None:
    for ask in (shell, shell.dry):
        assert says in ask("explain", *argv).reason


def test_a_model_whose_inputs_are_unknown_needs_them(shell: Shell) -> None:
    from sparsedm_compiler.models import open_with_inputs

    model, args, _ = open_with_inputs("own:halves", inputs="3x4,1", device="cpu")
    made = sdm.compile(model, "2:4", policy="all", backend="eager")
    made(*args)
    sdm.save(made, shell.folder / "halves.safetensors")
    asked = ("explain", "halves.safetensors", "--model", "own:halves", "--backend", "eager")
    assert "returns no inputs: give --inputs" in shell.dry(*asked).reason
    assert "inner.weight" in shell(*asked, "--inputs", "3x4,1").out
