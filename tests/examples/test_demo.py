"""The demo, every line of it, with a budget of seconds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # DPM-Solver
def test_demo_quick_prunes_trains_measures_and_draws(demo: ModuleType, tmp_path: Path) -> None:
    values = demo.main(["--quick", "--out", str(tmp_path)])
    teacher, *students = values["rows"]
    names = ["2:4 untrained", "2:4 fine-tuned", "1:4 untrained", "1:4 fine-tuned"]
    assert [row["name"] for row in students] == names
    half, _, quarter, _ = (row["macs"] for row in students)
    assert quarter < half < teacher["macs"]
    raw, tuned, rawer, better = (row["loss"] for row in students)
    assert teacher["loss"] < 0.1 < tuned < raw < rawer
    assert better < rawer
    assert values == json.loads((tmp_path / "results.json").read_text())
    assert "| 1:4 fine-tuned |" in (tmp_path / "results.md").read_text()
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width > 20 * 8 * 6
        assert picture.height > 6 * 8 * 6
    assert (tmp_path / "student-1-4.safetensors").exists()


def test_digits_split_is_fixed_and_train_teacher_is_deterministic(demo: ModuleType) -> None:
    digits = demo.Digits.load()
    assert [len(part) for part in (*digits.train, *digits.test)] == [1437, 1437, 360, 360]
    assert digits.train[1][:6].tolist() == [3, 9, 1, 3, 1, 9]
    torch.manual_seed(5)
    first, again = (demo.train_teacher(digits, images=64, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pos_embed"], demo.digits_uvit().state_dict()["pos_embed"])
