"""What state_dict, save_pretrained and packed files hold, and the dtype they are loaded in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from tests.compiler.nets import (
    UNET,
    Chain,
    X,
    assert_masked,
    compiled_chain,
    compiled_unet,
    run_unet,
)
from tests.oracle import assert_same, oracle_of


def reload(student: nn.Module, folder: Path) -> nn.Module:
    student.save_pretrained(folder)
    return type(student).from_pretrained(folder).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["infer", "sparse"])
def test_pretrained_folder_when_saved_for_inference_holds_the_masked_model(
    mode: str, tmp_path: Path
) -> None:
    student = compiled_unet(mode)
    run_unet(student)
    assert_masked(student, run_unet(reload(student, tmp_path)))
    latent = UNET.build().state_dict()
    assert any(not torch.equal(p, latent[name]) for name, p in student.state_dict().items())


def test_pretrained_folder_when_saved_in_training_holds_latent_weights(tmp_path: Path) -> None:
    student = compiled_unet("train")
    run_unet(student)
    assert_same(run_unet(reload(student, tmp_path / "latent")), run_unet(UNET.build()))
    sdm.apply_masks(student)
    assert_masked(student, run_unet(reload(student, tmp_path / "masked")))


def test_state_dict_before_the_first_call_warns_that_it_is_dense() -> None:
    fast = compiled_chain("infer")
    with pytest.warns(UserWarning, match="so no weight is chosen yet and its state_dict is dense"):
        fast.state_dict()
    fast(X)
    fast.state_dict()


def test_saved_file_when_made_for_inference_holds_masked_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    fast = compiled_chain("infer")
    fast(X)
    sdm.save(fast, tmp_path / "fast")
    expected = oracle_of(fast).state_dict()
    for name, tensor in load_file(tmp_path / "fast").items():
        assert_same(tensor, expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_packed_file_when_loaded_into_another_dtype_is_cast(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    fast = compiled_chain("sparse", finalize=True)
    fast(X)
    sdm.save(fast, tmp_path / "packed")
    loaded = sdm.load(tmp_path / "packed", Chain().to(dtype), backend="eager")
    for _ in range(2):
        out = loaded(X.to(dtype))
        assert out.dtype == dtype
        assert_same(out.float(), fast(X), tolerance=0.02)


def test_masks_when_applied_leave_the_output_and_are_checked() -> None:
    student = compiled_chain()
    with pytest.raises(sdm.ConfigError, match="chosen no weights yet"):
        sdm.apply_masks(student)
    out = student(X)
    expected = oracle_of(student)
    assert sdm.apply_masks(student) == ("b.weight", "c.weight")
    assert_same(student(X), out)
    for name, weight in student.named_parameters():
        assert_same(weight, expected.get_parameter(name))
    fast = compiled_chain("sparse", finalize=True)
    fast(X)
    with pytest.raises(sdm.ConfigError, match="is finalized"):
        sdm.apply_masks(fast)
