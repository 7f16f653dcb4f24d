"""``sparsedm explain``: saved decisions, kernels and MACs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence

import pytest
import torch

import sparsedm_compiler as sdm
from tests.cli.conftest import Shell, student

EXPLAIN = ("explain", "student.safetensors", "--model", "own:net", "--backend", "eager")


def test_explain_shows_the_saved_decisions(shell: Shell, weights: Sequence[str]) -> None:
    result = shell(*EXPLAIN, "--mode", "train")
    made = student()
    assert result.out == f"{sdm.explain(made)}\n"
    assert "mid_block.attn.qkv.weight" in result.out
    assert "dense: first op of the graph" in result.out


def test_explain_in_mode_infer_shows_kernels(shell: Shell, weights: Sequence[str]) -> None:
    result = shell(*EXPLAIN)
    assert "mode 'infer', compiled by 'eager'" in result.out
    assert "folded weights: " in result.out


def test_explain_macs_equals_count_macs_of_the_pruned_model(shell: Shell) -> None:
    options = {"keep_dense": ["mid_block"], "overrides": {"*.fc1": "2:4"}}
    with pytest.warns(UserWarning, match="pattern 2:4 became 1:8"):
        made = sdm.compile(student().float(), "1:8", backend="eager", **options)
    args = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    made(*args)
    sdm.save(made, shell.folder / "student.safetensors")
    result = shell(*EXPLAIN, "--mode", "train", "--macs")
    expected = sdm.count_macs(student(), *args, pattern="1:8", **options)
    assert result.out == f"{sdm.explain(made)}\n\n{expected}\n"


def test_explain_of_a_run_folder_opens_its_model(shell: Shell, weights: Sequence[str]) -> None:
    values = {"model": {"name": "own:net"}, "data": {"train": "digits"}, "out": "runs/a"}
    (shell.folder / "runs/a").mkdir(parents=True)
    (shell.folder / "runs/a/run.json").write_text(json.dumps(values), encoding="utf-8")
    assert "runs/a has no student.safetensors" in shell("explain", "runs/a").reason
    shutil.copy("student.safetensors", "runs/a")
    argv = ("--mode", "train", "--backend", "eager")
    assert shell("explain", "runs/a", *argv).out == shell(*EXPLAIN, "--mode", "train").out
    for ask in (shell, shell.dry):
        result = ask("explain", "student.safetensors")
        assert "student.safetensors is not the folder of a run: give --model too" in result.reason


def test_explain_dry_run_names_the_file(shell: Shell, weights: Sequence[str]) -> None:
    result = shell.dry(*EXPLAIN)
    assert result.out.splitlines()[0] == (
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
def test_explain_of_an_invalid_request_is_refused(
    shell: Shell, weights: Sequence[str], argv: list[str], says: str
) -> None:
    for ask in (shell, shell.dry):
        assert says in ask("explain", *argv).reason


def test_explain_of_unknown_inputs_needs_the_option(shell: Shell) -> None:
    from sparsedm_compiler.models import open_with_inputs

    model, args, _ = open_with_inputs("own:halves", inputs="3x4,1", device="cpu")
    made = sdm.compile(model, "2:4", policy="all", backend="eager")
    made(*args)
    sdm.save(made, shell.folder / "halves.safetensors")
    argv = ("explain", "halves.safetensors", "--model", "own:halves", "--backend", "eager")
    assert "returns no inputs: give --inputs" in shell.dry(*argv).reason
    assert "inner.weight" in shell(*argv, "--inputs", "3x4,1").out
