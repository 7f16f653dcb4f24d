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


def test_prune_permuted_and_mixed_then_a_student_of_the_chosen_patterns(
    shell: Shell, weights: Sequence[str]
) -> None:
    mixed = ("--mixed", "2:4,1:4,1:8", "--permute", "--method", "magnitude")
    assert shell(*PRUNE, "--pattern", "1:4", *mixed).status == 0
    choice = json.loads((shell.folder / "runs/a/patterns.json").read_text())
    assert choice["cost"] <= choice["budget"]
    patterns = {row["weight"]: row["pattern"] for row in choice["layers"]}
    report = json.loads((shell.folder / "runs/a/report.json").read_text())
    assert {row["weight"]: row["pattern"] for row in report["layers"]} == patterns
    permutation = json.loads((shell.folder / "runs/a/permutation.json").read_text())
    assert permutation["kept_after"] > permutation["kept_before"]
    kept = {row["weight"]: row["kept_after"] for row in permutation["weights"]}
    for row in report["layers"]:
        assert row["kept_energy"] == pytest.approx(kept[row["weight"]], rel=1e-5)
    again = (*PRUNE[:-1], "runs/b", "--mixed", "runs/a/patterns.json", "--method", "magnitude")
    assert shell(*again).status == 0
    report = json.loads((shell.folder / "runs/b/report.json").read_text())
    assert {row["weight"]: row["pattern"] for row in report["layers"]} == patterns
    for option in (("--pattern", "1:4"), ("--policy", "all"), ("--keep-dense", "mid_block")):
        assert f"{option[0]} is chosen in --mixed runs/a" in shell(*again, *option).reason
    (shell.folder / "runs/a/patterns.json").write_text("{}")
    assert "is no choice of patterns: it lacks" in shell.dry(*again).reason


def test_prune_dry_run_says_what_would_happen(shell: Shell, weights: Sequence[str]) -> None:
    result = shell.dry(*PRUNE, "--pattern", "2:4", "--override", "mid_block=1:4")
    assert result.out.splitlines()[0] == (
        "would prune own:net with weights dense.safetensors, dense, on cpu to 2:4 by obs, "
        "calibrated with 64 images of digits, and write runs/a"
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--pattern is missing: give one, e.g. 2:4, or --mixed patterns.json"),
        (["--mixed", "2:4,1:4"], "--pattern is missing"),
        (["--mixed", "gone.json"], "cannot read gone.json"),
        (["--pattern", "5:4"], "pattern '5:4' is not 'n:m'"),
        (["--pattern", "2:4", "--method", "taylor"], "method 'taylor' is none of obs"),
        (["--pattern", "2:4", "--override", "mid_block"], "is not GLOB=PATTERN"),
        (["--pattern", "2:4", "--objective", "noise"], "--objective noise is none of eps"),
        (["--pattern", "2:4", "--weights", "student.safetensors"], "is pruned already"),
        (["--pattern", "2:4", "--data", "gone"], "'gone' does not exist"),
        (["--pattern", "2:4", "--timestep-weights", "odd"], "timestep_weights 'odd' is neither"),
        (["--pattern", "2:4", "--policy", "none"], "policy 'none' is neither"),
        (["--pattern", "2:4", "--budget", "watts"], "--budget watts is none of macs, time"),
        (["--pattern", "2:4", "--mixed", "2:4,x"], "pattern 'x' is not 'n:m'"),
        (["--pattern", "2:4", "--budget", "time"], "--budget time is for --mixed"),
        (["--pattern", "2:4", "--mixed", "1:1,4:4"], "--mixed 1:1,4:4 prunes nothing"),
        (["--pattern", "2:4", "--mixed", "2:4", "--override", "a=1:4"], "both choose patterns"),
    ],
    ids=[
        *("no_pattern", "mixed_alone", "no_choice"),
        *("pattern", "method", "override", "objective", "pruned", "data", "weights", "policy"),
        *("budget", "mixed", "budget_alone", "dense_mixed", "mixed_and_override"),
    ],
)
def test_prune_of_an_invalid_request_is_refused(
    shell: Shell, weights: Sequence[str], argv: list[str], says: str
) -> None:
    for ask in (shell, shell.dry):
        assert says in ask(*PRUNE, *argv).reason
