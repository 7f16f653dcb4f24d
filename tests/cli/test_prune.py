"""``sparsedm prune``: a pruned model, the error of its layers, and requests that are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

import sparsedm_compiler as sdm
from sparsedm_compiler.models import open_with_inputs
from tests.cli.conftest import Shell

PRUNE = (
    "prune", "--model", "own:net", "--weights", "dense.safetensors", "--data", "digits",
    "--no-labels", "--images", "64", "--backend", "eager", "--out", "runs/a",
)  # fmt: skip


def test_prune_writes_a_student_that_other_commands_open(
    shell: Shell, weights: Sequence[str]
) -> None:
    argv = (*PRUNE, "--pattern", "2:4", "--keep-dense", "mid_block", "--held-out", "digits:test")
    result = shell(*argv)
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("dense: held-out loss ")
    assert lines[-2].startswith("obs: held-out loss ")
    assert lines[-1] == "wrote runs/a/student.safetensors"
    report = json.loads((shell.folder / "runs/a/report.json").read_text())
    names = [row["weight"] for row in report["layers"]]
    assert names
    assert not any(name.startswith("mid_block") for name in names)
    dense, _args, _ = open_with_inputs("own:net", options={}, device="cpu")
    student = sdm.load(shell.folder / "runs/a/student.safetensors", dense, backend="eager")
    for name in names:
        weight = student.get_parameter(name)
        assert torch.equal(weight, weight * sdm.Pattern.parse("2:4").compute_mask(weight.detach()))
    shown = shell("explain", "runs/a/student.safetensors", *PRUNE[1:3], "--backend", "eager")
    assert all(name in shown.out for name in names)
    again = shell(*argv)  # every layer is there already
    assert again.out == result.out


def test_prune_dry_run_says_what_would_happen(shell: Shell, weights: Sequence[str]) -> None:
    result = shell.dry(*PRUNE, "--pattern", "2:4", "--override", "mid_block=1:4")
    assert result.out.splitlines()[0] == (
        "would prune own:net with weights dense.safetensors, dense, on cpu to 2:4 by obs, "
        "calibrated with 64 images of digits, and write runs/a"
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--pattern", "5:4"], "pattern '5:4' is not 'n:m'"),
        (["--pattern", "2:4", "--method", "taylor"], "method 'taylor' is none of obs"),
        (["--pattern", "2:4", "--override", "mid_block"], "is not GLOB=PATTERN"),
        (["--pattern", "2:4", "--objective", "noise"], "--objective noise is none of eps"),
        (["--pattern", "2:4", "--weights", "student.safetensors"], "is pruned already"),
        (["--pattern", "2:4", "--data", "gone"], "'gone' does not exist"),
        (["--pattern", "2:4", "--timestep-weights", "odd"], "timestep_weights 'odd' is neither"),
        (["--pattern", "2:4", "--policy", "none"], "policy 'none' is neither"),
    ],
    ids=["pattern", "method", "override", "objective", "pruned", "data", "weights", "policy"],
)
def test_prune_of_an_invalid_request_is_refused(
    shell: Shell, weights: Sequence[str], argv: list[str], says: str
) -> None:
    for ask in (shell, shell.dry):
        assert says in ask(*PRUNE, *argv).reason
