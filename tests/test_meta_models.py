"""Models on the meta device: shapes work, and whatever needs values says so in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparsedm_compiler as sdm
from sparsedm_compiler.diffusion import make_scheduler, sample
from sparsedm_compiler.models import UViT

X, T, DATA = torch.zeros(1, 1, 4, 4), torch.tensor([5]), torch.zeros(8, 1, 4, 4)
QUIET = {"images": 8, "batch_size": 8, "progress": False}


def make_net(device: str) -> UViT:
    with torch.device(device):
        return UViT(img_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2)


def make_student(device: str, mode: str = "train") -> UViT:
    return sdm.compile(make_net(device), "2:4", mode=mode, backend="eager")


def save_real(path: Path) -> Path:
    student = make_student("cpu")
    student(X, T)
    sdm.save(student, path)
    return path


CALLS: dict[str, Callable[[Path], object]] = {
    "this call": lambda path: make_student("meta", "infer")(X, T),
    "saving it": lambda path: sdm.save(make_student("meta"), path),
    "loading into it": lambda path: sdm.load(save_real(path), make_net("meta")),
    "detecting its pattern": lambda path: sdm.compile(make_net("meta"), mode="infer"),
    "fine-tuning": lambda path: sdm.finetune(make_student("meta"), None, DATA, **QUIET),
    "its loss": lambda path: sdm.held_out_loss(make_student("meta"), DATA),
    "sampling": lambda path: sample(
        make_student("meta"), make_scheduler("ddim", "eps"), shape=(1, 1, 4, 4), steps=2
    ),
}


@pytest.mark.parametrize("use", CALLS)
def test_call_of_a_meta_model_that_needs_values_says_so(use: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    says = (
        "UViT has no values for 'pos_embed' and 43 other tensors, which are on the meta device, "
        f"and {use} needs them: open the model on cpu or cuda, with its weights"
    )
    with pytest.raises(sdm.ConfigError) as caught:
        CALLS[use](tmp_path / "model.safetensors")
    assert str(caught.value) == says


def test_finetune_with_a_meta_teacher_says_so() -> None:
    with pytest.raises(sdm.ConfigError, match="and fine-tuning needs them"):
        sdm.finetune(make_student("cpu"), make_net("meta"), DATA, **QUIET)


def test_meta_student_explains_and_counts_without_values() -> None:
    student = make_student("meta")
    report = sdm.explain(student, X.to("meta"), T.to("meta"))
    assert "mid_block.mlp.fc1.weight" in report.masked
