"""A working directory with models, weights and a judge that a command line can name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sparsedm_compiler as sdm
from sparsedm_compiler.cli import main
from sparsedm_compiler.models import UViT, open_with_inputs

OWN = """
import torch
from torch import nn
from sparsedm_compiler.models import UViT

TINY = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=16, num_heads=2, conv=False)

def net(depth=2, num_classes=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return UViT(depth=depth, num_classes=num_classes, **TINY)

class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
    def forward(self, x, t, y=None):
        return self.inner(x)

def halves():
    return Halves()

def pixels():
    return lambda images: images.flatten(1)
"""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The exit status of a command and the text it printed."""

    status: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """The one line of a refused request, with nothing else printed."""
        assert (self.status, self.out, self.err.count("\n")) == (2, "", 1), self
        return self.err


class Shell:
    """Runs commands in this process, in a folder of their own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, *argv: str | Path) -> CommandResult:
        self.capsys.readouterr()
        status = main([str(part) for part in argv])
        out, err = self.capsys.readouterr()
        return CommandResult(status, out, err)

    def dry(self, *argv: str | Path) -> CommandResult:
        """The same command with --dry-run, which must not change the folder."""
        before = self.listing()
        result = self(*argv, "--dry-run")
        assert self.listing() == before
        if result.status == 0:
            assert result.out.endswith("dry run: nothing was computed or written\n")
        return result

    def listing(self) -> dict[str, bytes | None]:
        """Every file with its bytes, every folder."""
        paths = sorted(path for path in self.folder.rglob("*") if "__pycache__" not in path.parts)
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEDM_PROGRESS", "0")  # how long anything takes is not the matter here
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return Shell(tmp_path, capsys)


def student(spec: str = "own:net", pattern: str = "2:4", **options: object) -> UViT:
    """A compiled student of a model in the working directory, called once."""
    torch._dynamo.reset()
    model, args, kwargs = open_with_inputs(spec, options=options, device="cpu")
    made = sdm.compile(model, pattern, backend="eager")
    with torch.no_grad():
        made(*args, **kwargs)
    return made


@pytest.fixture
def weights(shell: Shell) -> Sequence[str]:
    """student.safetensors, pruned to 2:4, and dense.safetensors of the same model."""
    made = student()
    sdm.save(made, shell.folder / "student.safetensors")
    save_file(made.state_dict(), shell.folder / "dense.safetensors")
    return "student.safetensors", "dense.safetensors"
