"""The example from a diffusers config to an ONNX file, at its smallest size."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("onnxscript", reason='needs the extra "export"')
    pytest.importorskip("onnxruntime", reason='needs the extra "export"')
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("diffusers_end_to_end")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_example_quick_trains_reloads_adapts_and_exports_a_sparse_pipeline(
    example: ModuleType, tmp_path: Path
) -> None:
    values = example.main(["--quick", "--out", str(tmp_path)])
    first, last = values["losses"]
    assert last < first
    assert values["pruned"] > 20
    assert 0 < values["difference"] < 1e-4
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.width > 4 * 8 * 8
    assert (tmp_path / "sparse" / "unet" / "config.json").exists()
