"""The Python of the README runs as it stands there, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

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
    model = UViT(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2)
    data = torch.rand(64, 1, 8, 8) * 2 - 1
    names = {"torch": torch, "model": model, "data": data}
    names |= {"x": data[:1], "t": torch.tensor([5])}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[0], names)
    assert isinstance(names["student"], UViT)
    assert "dense: first op of the graph" in capsys.readouterr().out
    with torch.no_grad():
        fast = names["fast"](data[:1], torch.tensor([5]))
    expected = sdm.compile(model, "2:4", mode="infer", backend="eager")(data[:1], torch.tensor([5]))
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-5)
    names["optimizer"] = torch.optim.AdamW(names["student"].parameters())
    exec(blocks[1], names)
