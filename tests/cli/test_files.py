"""``sparsedm check`` and ``sparsedm convert``."""

from __future__ import annotations

from collections.abc import Sequence

import diffusers
from safetensors.torch import load_file

import sparsedm_compiler as sdm
from sparsedm_compiler.files import check_file
from sparsedm_compiler.models import open_model
from tests.cli.conftest import Shell
from tests.diffusers.cases import run, saved_unet, small_unet
from tests.oracle import assert_same


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
    assert "cannot read weights from nowhere" in shell("check", "nowhere").reason
    assert "cannot read weights from nowhere" in shell("convert", "nowhere", "c").reason
    assert "there is no folder gone" in shell("convert", "student.safetensors", "gone/c").reason


def test_compact_weights_open_like_any_others(shell: Shell, weights: Sequence[str]) -> None:
    shell("convert", "student.safetensors", "c.safetensors")
    argv = ("--model", "own:net", "--backend", "eager", "--mode", "train")
    result = shell("explain", "c.safetensors", *argv)
    assert result.out == shell("explain", "student.safetensors", *argv).out


def test_folder_of_a_pruned_diffusers_model_opens_pruned(shell: Shell) -> None:
    config = sdm.SparseConfig("2:4", backend="eager")
    dense = saved_unet(shell.folder / "dense")
    student = diffusers.UNet2DModel.from_pretrained(dense, quantization_config=config)
    run(student)
    student.save_pretrained("sparse")
    argv = ("--weights", "nowhere", "--count", "1", "--out", "images")
    assert "nowhere" in shell("sample", "--model", "sparse", *argv).reason
    result = shell.dry("sample", "--model", "sparse", "--count", "1", "--out", "images")
    assert "sparse with weights sparse/diffusion_pytorch_model.safetensors, masked to 2:4" in (
        result.out
    )
    assert_same(open_model("sparse").conv_in.weight, small_unet().conv_in.weight)
    student.save_pretrained("shards", max_shard_size="20KB")
    (shell.folder / "sparse/diffusion_pytorch_model.safetensors").unlink()
    assert (
        "quantized by sparsedm or lie in shards"
        in shell("sample", "--model", "shards", "--count", "1", "--out", "images").reason
    )
