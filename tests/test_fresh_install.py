"""The core alone, installed into a fresh environment from the package index: ``make core``.

It downloads torch, so that it runs where SPARSEDM_FRESH_INSTALL is set, as ``make core`` and CI do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("sparsedm_compiler", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")

SCRIPT = r"""
import pathlib, textwrap
import torch
import sparsedm_compiler as sdm

block = pathlib.Path("block.py").read_text()
finetune = next(line for line in block.splitlines() if line.startswith("sdm.finetune("))
names = {}
exec(block.partition(finetune)[0], names)
try:
    exec(finetune, names)
except sdm.ConfigError as error:
    assert str(error).endswith('pip install "sparsedm-compiler[train]"'), error
else:
    raise AssertionError("finetune ran without its extra")
student, x, t = names["student"], names["x"], names["t"]
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
handle = sdm.sr_ste(optimizer, student, lam=2e-4)
student(x, t).square().mean().backward()
optimizer.step()
handle.remove()
exec(block.partition(finetune)[2], names)
model = textwrap.indent(block.partition("x, t =")[0], "    ")
pathlib.Path("own.py").write_text(f"def net():\n{model}\n    return model\n")
print("the core works")
"""


@pytest.mark.skipif(
    not os.environ.get("SPARSEDM_FRESH_INSTALL"), reason="installs torch from the index: make core"
)
def test_core_installed_alone_runs_the_readme_and_the_commands(tmp_path: Path) -> None:
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    work = tmp_path / "work"
    work.mkdir()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(import torch\n.*?)```", readme, flags=re.DOTALL)
    (work / "block.py").write_text(block, encoding="utf-8")
    (work / "script.py").write_text(SCRIPT, encoding="utf-8")
    venv.create(tmp_path / "venv", with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str, folder: Path = work) -> str:
        program = str(tmp_path / "venv/bin" / command[0])
        done = subprocess.run(
            [program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for package in ("torch", "."):
        run(
            "python",
            "-m",
            "pip",
            "install",
            "-q",
            "-c",
            "constraints.txt",
            package,
            folder=tmp_path,
        )
    assert "diffusers" not in run("python", "-m", "pip", "list")
    assert run("python", "script.py").endswith("the core works\n")
    assert "2:4 conv+linear" in run("sparsedm", "macs", "--model", "uvit-cifar10-small")
    options = ("--model", "own:net", "--backend", "eager")
    assert "decoder_pred.weight" in run("sparsedm", "explain", "student.safetensors", *options)
