"""``sparsedm export``, and ``sparsedm check`` of what it writes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import sparsedm_compiler as sdm
from tests.cli.conftest import Shell

OWN = ("--model", "own:net", "--weights", "student.safetensors", "--inputs", "2x1x8x8,2")


def test_export_writes_a_file_that_check_accepts(shell: Shell, weights: Sequence[str]) -> None:
    pytest.importorskip("onnxscript", reason='needs the extra "export"')
    result = shell("export", "net.onnx", *OWN, "--dynamic-batch", "--dtype", "float16")
    report = sdm.check_onnx("net.onnx")
    assert (result.status, result.out) == (0, f"{report}\n")
    assert {row.dtype for row in report.rows} == {"FLOAT16"}
    assert sum(row.fits is True for row in report.rows) > 3
    result = shell("check", "net.onnx")
    assert (result.status, result.out) == (0, f"{report}\n")
    result = shell("check", "net.onnx", "--pattern", "1:16")
    assert (result.status, "NO" in result.out) == (1, True)
    assert "--card is for safetensors" in shell("check", "net.onnx", "--card", "R.md").reason


def test_export_dry_run_writes_nothing(shell: Shell, weights: Sequence[str]) -> None:
    result = shell.dry("export", "net.onnx", *OWN)
    assert result.out.startswith("would write net.onnx of own:net with weights student.safetensors")


def test_export_that_cannot_be_done_is_refused(shell: Shell, weights: Sequence[str]) -> None:
    assert "net.pt is neither .onnx nor .pt2" in shell("export", "net.pt", *OWN).reason
    refused = shell("export", "net.onnx", *OWN, "--sparse-kernels").reason
    assert "--sparse-kernels is for .pt2" in refused
    assert "--opset is for .onnx" in shell("export", "net.pt2", *OWN, "--opset", "18").reason
    refused = shell("export", "net.onnx", "--model", "own:net", "--weights", "dense.safetensors")
    assert "holds no pruned model" in refused.reason
