"""The Python of the README runs as it stands there, on a small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[0], names)
    student, model, inputs = names["student"], names["model"], (names["x"], names["t"])
    assert isinstance(student, UViT)
    out = capsys.readouterr().out
    assert "dense: first op of the graph" in out
    assert out.splitlines()[-1].startswith("tensor(")
    for fast, dense in ((names["fast"], student), (names["other"], model)):
        with torch.no_grad():
            ours = fast(*inputs)
            expected = sdm.compile(dense, "2:4", mode="infer", backend="eager")(*inputs)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    exec(blocks[1], names)
    assert isinstance(names["optimizer"], torch.optim.AdamW)
