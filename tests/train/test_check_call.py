"""Data that a model does not take are refused in one line, by one plain forward of one sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.diffusion.condition import Condition
from sparsedm_compiler.diffusion.objective import make_objective
from sparsedm_compiler.errors import DataError
from sparsedm_compiler.models import UViT
from sparsedm_compiler.train import finetune
from sparsedm_compiler.train.check_call import IN_CONFIG, check_call, check_values
from tests.train.cases import student_of

BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}


def uvit(**options: Any) -> nn.Module:
    return UViT(img_size=8, in_chans=3, embed_dim=8, depth=0, num_heads=2, **options)


def unet(**options: Any) -> nn.Module:
    from diffusers import UNet2DModel

    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(sample_size=8, **kinds, **BLOCKS, **options)


def unet_of_text() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        **BLOCKS,
    )


class Own(nn.Module):
    """A model of a class that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mix(x)


LABELS = torch.tensor([1, 0])
CASES: dict[str, tuple[nn.Module, tuple[int, ...], Condition | None, str]] = {
    "size": (
        unet(),
        (3, 9, 9),
        None,
        r"the data: UNet2DModel cannot be called with images \[3, 9, 9\]: it takes \[3, 8, 8\]: "
        r"set data\.size=8",
    ),
    "size-uvit": (uvit(), (3, 9, 9), None, r"it takes \[3, 8, 8\]: set data\.size=8"),
    "channels": (unet(), (1, 8, 8), None, "it takes 3 channels: choose another data.train"),
    "channels-uvit": (uvit(), (1, 8, 8), None, "it takes 3 channels"),
    "text": (
        unet_of_text(),
        (3, 8, 8),
        None,
        r"it needs encoder_hidden_states: choose a data\.train that holds encoder_hidden_states",
    ),
    "labels-for-text": (
        unet_of_text(),
        (3, 8, 8),
        LABELS,
        r"and class labels: it needs encoder_hidden_states: choose",
    ),
    "no-labels": (
        unet(num_class_embeds=3),
        (3, 8, 8),
        None,
        r"it needs class_labels: choose a data\.train with labels",
    ),
    "no-labels-uvit": (uvit(num_classes=3), (3, 8, 8), None, "it needs y: choose a data.train"),
    "labels": (
        unet(),
        (3, 8, 8),
        LABELS,
        r"\[3, 8, 8\] and class labels: it takes no condition: set data\.labels=false",
    ),
    "labels-uvit": (uvit(), (3, 8, 8), LABELS, "it takes no condition: set data.labels=false"),
    "labels-own": (Own(), (3, 8, 8), LABELS, r"Own cannot be called .*set data\.labels=false\?"),
    "own": (Own(), (1, 8, 8), None, r"Own cannot be called with images \[1, 8, 8\]: .*channels"),
    "label-range": (
        unet(num_class_embeds=3),
        (3, 8, 8),
        LABELS + 2,
        "label 3 is none of the 3 classes of UNet2DModel: set model.options",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_check_call_with_data_of_another_kind_raises_one_line(case: str) -> None:
    model, shape, condition, says = CASES[case]
    objective = make_objective("eps")
    with pytest.raises(DataError, match=says) as refusal:
        check_call(model, objective, torch.zeros(2, *shape), condition, advice=IN_CONFIG)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_check_call_with_data_of_the_right_kind_passes_and_captures_nothing() -> None:
    objective, images = make_objective("eps"), torch.zeros(2, 3, 8, 8)
    check_call(unet(), objective, images, None)
    check_call(unet(num_class_embeds=3), objective, images, LABELS, dropped=torch.tensor([2]))
    text = {"encoder_hidden_states": torch.zeros(2, 5, 8)}
    check_call(unet_of_text(), make_objective("flow"), images, text)
    student = sdm.compile(uvit(num_classes=3), "1:4", policy="all", backend="eager")
    check_call(student.double(), objective, images, LABELS)
    assert sdm.masked_parameters(student) == {}  # the first call would have captured them


def test_check_call_with_a_dropped_label_that_is_no_class_raises() -> None:
    model, objective = unet(num_class_embeds=3), make_objective("eps")
    with pytest.raises(DataError, match=r"label 3 .*: set train\.null_label to a class"):
        check_call(
            model,
            objective,
            torch.zeros(2, 3, 8, 8),
            LABELS,
            dropped=torch.tensor([3]),
            advice=IN_CONFIG,
        )


def test_check_values_of_unscaled_images_raises() -> None:
    with pytest.raises(DataError, match=r"range from 0 to 255: scale them .* x / 127\.5 - 1"):
        check_values(torch.tensor([[0.0, 255.0]]))
    with pytest.raises(DataError, match="hold NaN or Inf"):
        check_values(torch.tensor([[0.0, torch.inf]]))
    check_values(torch.tensor([[-40.0, 30.0]]))  # latents that nobody scaled
    check_values(torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("taught", [True, False], ids=["teacher", "student"])
def test_finetune_with_data_of_another_kind_raises_and_writes_nothing(
    taught: bool, tmp_path: Path
) -> None:
    model = uvit()
    out = tmp_path / "runs/a"
    options: dict[str, Any] = {"images": 16, "batch_size": 8, "progress": False, "out": out}
    cases = {
        r"takes \[3, 8, 8\]: bring the data to that size": torch.zeros(9, 3, 9, 9),
        "takes 3 channels": torch.zeros(9, 1, 8, 8),
        "leave the labels out": (torch.zeros(9, 3, 8, 8), torch.zeros(9, dtype=torch.long)),
        r"0 to 255: scale": torch.linspace(0, 255, 9 * 3 * 64).reshape(9, 3, 8, 8),
    }
    for says, data in cases.items():
        student = student_of(model)
        with pytest.raises(DataError, match=says):
            finetune(student, model if taught else None, data, **options)
        assert [*tmp_path.iterdir()] == []
        assert sdm.masked_parameters(student) == {}


def test_finetune_with_held_out_data_of_another_kind_raises_at_once(tmp_path: Path) -> None:
    model, data = uvit(), torch.zeros(9, 3, 8, 8)
    options: dict[str, Any] = {"images": 16, "batch_size": 8, "progress": False}
    for held_out, says in (
        (torch.zeros(4, 3, 9, 9), "the held-out data: UViT cannot .* it takes"),
        (torch.full((4, 3, 8, 8), 255.0), "the first images of the held-out data range from 255"),
        (torch.full((4, 3, 8, 8), torch.nan), "the first images of the held-out data hold NaN"),
    ):
        with pytest.raises(DataError, match=says):
            finetune(student_of(model), model, data, held_out=held_out, **options, out=tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_finetune_with_dropped_labels_and_no_null_label_raises_at_once(tmp_path: Path) -> None:
    model = uvit(num_classes=3)
    data = torch.zeros(9, 3, 8, 8), torch.zeros(9, dtype=torch.long)
    options: dict[str, Any] = {"images": 16, "batch_size": 8, "progress": False}
    with pytest.raises(sdm.ConfigError, match="drop_condition needs null_label"):
        finetune(student_of(model), model, data, drop_condition=1e-9, **options, out=tmp_path / "a")
    with pytest.raises(DataError, match=r"label 3 .*: null_label must be a class"):
        finetune(student_of(model), model, data, drop_condition=1e-9, null_label=3, **options)
    assert [*tmp_path.iterdir()] == []
