"""The Python of the guide runs as it stands there, on its small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

import sparsedm_compiler as sdm
from tests.oracle import masked_patterns

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "diffusers.md"


def test_python_blocks_of_the_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparsedm_compiler.compiler.inner_backend.find_compiler", lambda: None)
    torch._dynamo.reset()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL):
        exec(block, names)
    out = capsys.readouterr().out
    patterns = masked_patterns(names["student"])
    assert f"{len(patterns)} weights are masked" in out
    assert "dropped / adapter" in out
    assert {str(pattern) for pattern in patterns.values()} == {"2:4", "1:4"}
    assert not any(name.startswith("mid_block") for name in patterns)
    assert masked_patterns(UNet2DModel.from_pretrained("fast")) == patterns
    assert isinstance(names["pipeline"].unet, UNet2DModel)
    assert sdm.pattern_of(names["pipeline"].unet) == sdm.Pattern.parse("2:4")
