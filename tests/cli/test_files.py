"""``sparsedm check`` and ``sparsedm convert``."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import load_file

from sparsedm_compiler.files import check_file
from tests.cli.conftest import Shell


def test_convert_and_check_show_what_a_file_holds(shell: Shell, weights: Sequence[str]) -> None:
    result = shell("convert", "student.safetensors", "c.safetensors", "--base-model", "org/base")
    assert result.status == 0
    assert "c.safetensors: " in result.out
    result = shell("check", "c.safetensors", "--card", "README.md")
    assert (result.status, result.out) == (0, f"{check_file('c.safetensors')}\n")
    assert "mid_block.attn.qkv.weight" in result.out
    assert "base_model: org/base" in (shell.folder / "README.md").read_text()
    result = shell("convert", "c.safetensors", "d.safetensors", "--form", "dense", "--loss", "0.5")
    assert result.status == 0
    assert load_file("d.safetensors")["mid_block.attn.qkv.weight"].count_nonzero()
    assert check_file("d.safetensors").provenance == {"base_model": "org/base", "loss": 0.5}
    result = shell("check", "d.safetensors", "--pattern", "1:16")
    assert (result.status, "NO" in result.out) == (1, True)


def test_check_and_convert_dry_runs_write_nothing(shell: Shell, weights: Sequence[str]) -> None:
    result = shell.dry("convert", "student.safetensors", "c.safetensors")
    assert result.out.startswith("would write c.safetensors, compact")
    result = shell.dry("check", "student.safetensors", "--card", "README.md")
    assert result.out.startswith("would show ")
    assert not {"c.safetensors", "README.md"} & {path.name for path in shell.folder.iterdir()}


def test_check_and_convert_of_no_file_are_refused(shell: Shell, weights: Sequence[str]) -> None:
    assert "cannot read nowhere" in shell("check", "nowhere").reason
    assert "cannot read nowhere" in shell("convert", "nowhere", "c").reason
    assert "there is no folder gone" in shell("convert", "student.safetensors", "gone/c").reason
