"""With the core dependencies alone the public names are there, and those that need more say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forked import ForkServer

RunCore = Callable[[str], list[str]]

CORE = r'''
import sys
from importlib.machinery import PathFinder

EXTRAS = {
    "accelerate", "datasets", "diffusers", "matplotlib", "onnx", "onnx_ir", "onnxruntime",
    "onnxscript", "peft", "PIL", "pytorch_fid", "scipy", "sklearn", "tensorboard", "torchvision",
    "tqdm", "transformers", "yaml",
}


class CorePackages(PathFinder):
    """Finds every package but the extras, as where they are not installed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            return None
        return super().find_spec(name, path, target)


sys.meta_path = [CorePackages if finder is PathFinder else finder for finder in sys.meta_path]

import torch
import sparsedm_compiler as sdm

torch.manual_seed(0)
net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
student = sdm.compile(net, pattern="2:4", backend="eager")
data = torch.randn(4, 8)
student(data)
'''


@pytest.fixture(scope="module")
def run_core() -> Iterator[RunCore]:
    """Runs code after CORE in a process of its own; returns the lines it prints."""
    with ForkServer(CORE) as server:

        def run(code: str) -> list[str]:
            done = server.run(code)
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        yield run


def test_public_names_with_core_packages_alone_are_listed_and_resolve(run_core: RunCore) -> None:
    code = """
print(sorted({*sdm.__all__} ^ {*dir(sdm)}))
print(sorted(name for name in sdm.__all__ if not callable(getattr(sdm, name))))
namespace = {}
exec("from sparsedm_compiler import *", namespace)
print(sorted({*sdm.__all__} - {*namespace}))
"""
    assert run_core(code) == ["['__version__']", "[]", "[]"]


def test_sr_ste_with_core_packages_alone_trains(run_core: RunCore) -> None:
    code = """
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
handle = sdm.sr_ste(optimizer, student, lam=10.0)
before = student[1].weight.detach().clone()
pruned = ~sdm.Pattern.parse("2:4").compute_mask(before)
for _ in range(3):
    optimizer.zero_grad()
    student(data).square().mean().backward()
    optimizer.step()
after = student[1].weight.detach()
print(bool((after[pruned].abs().sum() < before[pruned].abs().sum())))
handle.remove()
sdm.freeze_masks(student, optimizer=optimizer)
print(int((student[1].weight == 0).sum()))
"""
    assert run_core(code) == ["True", "32"]


def test_finetune_and_held_out_loss_without_the_extra_name_it(run_core: RunCore) -> None:
    code = """
config = sdm.FinetuneConfig.create("ste", images=8)
for call in (
    lambda: sdm.finetune(student, None, data, config=config),
    lambda: sdm.held_out_loss(student, data),
    lambda: sdm.train.SampleGrids((1, 4, 4)).draw(student, "eps"),
    lambda: sdm.train.SampleGrids((1, 4, 4)).save(None, torch.zeros(4, 1, 4, 4)),
):
    try:
        call()
    except sdm.ConfigError as error:
        assert isinstance(error, sdm.SparseDMError)
        print(error)
"""
    way = 'which is not installed: pip install "sparsedm-compiler[train]"'
    lines = run_core(code)
    assert len(lines) == 4
    assert all(line.endswith(way) for line in lines)
    assert lines[0].startswith("finetune needs tqdm")
    assert lines[1].startswith("the default noise schedule needs diffusers")
    assert lines[2].startswith("samplers need diffusers")
    assert lines[3].startswith("a sample grid needs Pillow")


def test_command_line_without_the_extra_prints_one_line_and_returns_2(run_core: RunCore) -> None:
    code = """
import contextlib, io
from sparsedm_compiler.cli import main
lines = io.StringIO()
with contextlib.redirect_stderr(lines):
    status = main(["finetune", "--data", "digits", "--out", "no/such", "--dry-run"])
print(status)
print(lines.getvalue(), end="")
"""
    assert run_core(code) == [
        "2",
        "sparsedm finetune: reading images needs Pillow, which is not installed: "
        'pip install "sparsedm-compiler[train]"',
    ]


def test_every_package_with_core_packages_alone_imports_or_names_the_extra(
    run_core: RunCore,
) -> None:
    code = """
import pkgutil, importlib
parts = pkgutil.walk_packages(sdm.__path__, "sparsedm_compiler.", onerror=lambda name: None)
packages = [part.name for part in parts if part.ispkg]
for name in (*packages, "sparsedm_compiler.experiment.run"):
    try:
        importlib.import_module(name)
    except sdm.ConfigError as error:
        assert 'pip install "sparsedm-compiler[train]"' in str(error), (name, error)
        print(name)
"""
    assert run_core(code) == ["sparsedm_compiler.data", "sparsedm_compiler.experiment.run"]


def test_explain_and_report_with_core_packages_alone_read_a_run(
    run_core: RunCore, tmp_path: Path
) -> None:
    code = f"""
import json, os, sys
from sparsedm_compiler.cli import main
from sparsedm_compiler.models import open_model
os.chdir({str(tmp_path)!r})
open("own.py", "w").write('''
from sparsedm_compiler.models import UViT
def net():
    return UViT(img_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2)
''')
sys.path.insert(0, ".")
student = sdm.compile(open_model("own:net"), "2:4", backend="eager")
student(torch.randn(1, 1, 4, 4), torch.tensor([5]))
os.mkdir("run")
sdm.save(student, "run/student.safetensors")
config = {{"model": {{"name": "own:net", "weights": "w"}}, "data": {{"train": "x"}}, "out": "run"}}
open("run/run.json", "w").write(json.dumps(config))
print(main(["explain", "run", "--backend", "eager", "--mode", "train"]))
print(main(["report", "run"]))
print("charts need matplotlib and Pillow" in open("report.html").read())
print(main(["sample", "--model", "run", "--out", "a.png"]))
"""
    lines = run_core(code)
    assert any(line.startswith("decoder_pred.weight") for line in lines), lines
    assert lines[-5:] == ["0", "wrote report.html", "0", "True", "2"]
