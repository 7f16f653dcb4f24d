"""One line of text for every source, the digits, and what importing costs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sparsedm_compiler.data
from sparsedm_compiler.data import LatentData, TensorData, open_data
from sparsedm_compiler.errors import ConfigError, DataError
from tests.data.cases import pixels, save

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_open_data_digits_equal_those_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    digits = importlib.import_module("digits").Digits.load()
    parts = {"digits": digits.train, "digits:train": digits.train, "digits:test": digits.test}
    for spec, (images, labels) in parts.items():
        data = open_data(spec)
        found, y = data.fetch(range(len(data)))
        assert torch.equal(found, images)
        assert isinstance(y, Tensor)
        assert torch.equal(y, labels)
        assert (data.shape, data.classes) == ((1, 8, 8), 10)
    with pytest.raises(DataError, match="no split 'val'"):
        open_data("digits:val")


def test_open_data_digits_with_size_labels_and_limit() -> None:
    data = open_data("digits:test", size=4, labels=False, limit=5)
    assert (len(data), data.shape, data.classes) == (5, (1, 4, 4), None)
    whole = open_data("digits:test").fetch(range(5))[0]
    box = whole.reshape(5, 1, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(data.fetch(range(5))[0], box)


def test_open_data_paths_with_colons_and_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    home = tmp_path / "a:b"
    (tmp_path / "a").mkdir()
    save(home / "pictures" / "1.png", pixels(2, 2, 3))
    np.savez(home / "x.npz", test_x=pixels(3, 2, 2, 3))
    save_file({"latents": torch.zeros(2, 4, 1, 1)}, home / "x.safetensors")
    for front in (str(home), "~/a:b"):
        assert len(open_data(f"{front}/pictures")) == 1
        assert len(open_data(f"{front}/x.npz:test")) == 3
        assert isinstance(open_data(f"{front}/x.safetensors"), LatentData)
        with pytest.raises(DataError, match=f"cannot read {re.escape(str(home))} as a dataset"):
            open_data(f"hf:{front}")
        with pytest.raises(DataError, match=f"MNIST in {re.escape(str(home))}: "):
            open_data(f"torchvision:MNIST:{front}:test")


def test_open_data_of_an_unknown_form_lists_the_forms(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    cases = [
        (f"{tmp_path}/none", "does not exist"),
        (f"{tmp_path}/x.tar", "no known kind"),
        ("cifar10", "does not exist"),
        ("", "'' does not exist"),
        ("digit:test", "does not exist"),
    ]
    forms = r".*digits\[:test\].*folder.*npz.*safetensors.*hf:.*torchvision:"
    for spec, message in cases:
        with pytest.raises(DataError, match=message + forms):
            open_data(spec)
    for options in ({"size": 0}, {"limit": 0}):
        with pytest.raises(DataError, match="not positive"):
            open_data("digits", **options)


def test_open_data_without_a_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> object:
        return None if name in ("sklearn", "datasets", "torchvision") else found(name, package)

    for module in ("image_data", "hub", "vision"):
        importlib.import_module(f"sparsedm_compiler.data.{module}")
    monkeypatch.setattr("sparsedm_compiler.optional_deps.find_spec", without)
    for spec, name in (
        ("digits", "scikit-learn"),
        ("hf:x", "datasets"),
        ("torchvision:MNIST:x", "torchvision"),
    ):
        with pytest.raises(ConfigError, match=f"pip install {name}"):
            open_data(spec)


def test_importing_data_imports_no_optional_package() -> None:
    code = (
        "import sys, sparsedm_compiler.data; print(sorted({'datasets', 'diffusers', 'matplotlib',"
        " 'sklearn', 'torchvision', 'pandas', 'scipy'} & {*sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_data_imports_nothing_of_the_compiler() -> None:
    allowed = {"errors", "fileio", "npz_archive", "optional_deps", "progress"}
    below = {"diffusion.condition", "diffusion.image_batches", "diffusion.modes"}
    for path in Path(sparsedm_compiler.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("sparsedm_compiler"), path.name
                assert node.level < 2 or node.module in allowed | below, path.name


def test_public_names_of_data_exist() -> None:
    assert all(name in vars(sparsedm_compiler.data) for name in sparsedm_compiler.data.__all__)
    assert isinstance(open_data("digits", limit=1), TensorData)
