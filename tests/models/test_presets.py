"""Presets are the published models: parameter counts, shapes, and inputs that fit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from sparsedm_compiler import optional_deps as optional_module
from sparsedm_compiler.errors import ConfigError, SparseDMError
from sparsedm_compiler.models import PRESETS, UViT, example_inputs, preset
from sparsedm_compiler.models.model_classes import MODEL_CLASSES
from sparsedm_compiler.models.presets import from_diffusers

DIT_EXTRA_EMBEDDERS = 27
DIT_EMBEDDER = (256 * 1152 + 1152) + (1152 * 1152 + 1152) + 1001 * 1152
"""diffusers gives every DiT block its own timestep and class embedder; DiT itself has one."""

MILLIONS = {
    "uvit-cifar10-small": 44,
    "uvit-celeba64-small": 44,
    "uvit-imagenet64-mid": 131,
    "uvit-imagenet256-large": 287,
    "uvit-imagenet256-huge": 501,
    "uvit-mscoco-small": 45,
    "ddpm-cifar10": 35.7,
    "sd15": 859.5,
    "sdxl": 2567,
    "dit-xl-2": 675,
    "sd3-medium": 2028,
    "flux1": 11_901,
}

OUTPUTS = {
    "uvit-cifar10-small": (2, 3, 32, 32),
    "uvit-celeba64-small": (2, 3, 64, 64),
    "uvit-imagenet64-mid": (2, 3, 64, 64),
    "uvit-imagenet256-large": (2, 4, 32, 32),
    "uvit-imagenet256-huge": (2, 4, 32, 32),
    "uvit-mscoco-small": (2, 4, 32, 32),
    "ddpm-cifar10": (2, 3, 32, 32),
    "sd15": (2, 4, 64, 64),
    "sdxl": (2, 4, 128, 128),
    "dit-xl-2": (2, 8, 32, 32),
    "sd3-medium": (2, 16, 128, 128),
    "flux1": (2, 4096, 64),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_size_and_output_shape(name: str) -> None:
    model, args, kwargs = preset(name, batch=2)
    count = sum(param.numel() for param in model.parameters())
    if name == "dit-xl-2":
        count -= DIT_EXTRA_EMBEDDERS * DIT_EMBEDDER
    assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.5)
    assert all(param.is_meta for param in model.parameters())
    with torch.no_grad():
        output = model(*args, **kwargs)
    sample = output if isinstance(output, torch.Tensor) else output.sample
    assert sample.shape == OUTPUTS[name]


def test_preset_on_the_cpu_computes_finite_values() -> None:
    torch.manual_seed(0)
    model, args, kwargs = preset("uvit-cifar10-small", device="cpu")
    assert {param.device.type for param in model.parameters()} == {"cpu"}
    with torch.no_grad():
        assert model(*args, **kwargs).isfinite().all()


def test_preset_of_an_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(ConfigError, match="'uvit-cifar10-smal'; did you mean uvit-cifar10-small"):
        preset("uvit-cifar10-smal")
    with pytest.raises(ConfigError, match="known: uvit-cifar10-small, uvit-celeba64-small"):
        preset("zzz")


def test_flux_inputs_have_row_and_column_positions() -> None:
    _, _, kwargs = preset("flux1", device="meta")
    assert kwargs["img_ids"].shape == (4096, 3)
    assert kwargs["txt_ids"].shape == (512, 3)
    model = from_diffusers(
        "FluxTransformer2DModel",
        {"num_layers": 0, "num_single_layers": 0, "num_attention_heads": 1},
    )
    _, kwargs = example_inputs(model, size=6, tokens=2)
    assert kwargs["img_ids"].tolist() == [[0, row, col] for row in range(3) for col in range(3)]
    assert "guidance" not in kwargs


def test_example_inputs_follow_sizes_and_dtype() -> None:
    model, _, _ = preset("sd15")
    (image, steps, text), _ = example_inputs(model.bfloat16(), batch=3, size=16, tokens=5)
    assert image.shape == (3, 4, 16, 16)
    assert text.shape == (3, 5, 768)
    assert (image.dtype, text.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (steps.dtype, steps.shape) == (torch.int64, (3,))
    assert image.is_meta


TINY_UNET = {"block_out_channels": (32,), "layers_per_block": 1, "norm_num_groups": 8}
ONE_BLOCK = {
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    **TINY_UNET,
}
TINY_TEXT = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("UNet2DModel", {"sample_size": 8, "num_class_embeds": 10, **ONE_BLOCK}),
        (
            "UNet2DConditionModel",
            {"sample_size": 8, "cross_attention_dim": 16, "num_class_embeds": 9, **ONE_BLOCK},
        ),
        (
            "PixArtTransformer2DModel",
            {
                **TINY_TEXT,
                "caption_channels": 8,
                "cross_attention_dim": 48,
                "attention_head_dim": 24,
            },
        ),
        (
            "LTXVideoTransformer3DModel",
            {"caption_channels": 8, "cross_attention_dim": 32, "in_channels": 8, **TINY_TEXT},
        ),
        ("WanTransformer3DModel", {"text_dim": 8, "freq_dim": 8, "ffn_dim": 8, **TINY_TEXT}),
        (
            "SanaTransformer2DModel",
            {
                "caption_channels": 8,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 32,
                "guidance_embeds": True,
                **TINY_TEXT,
            },
        ),
        (
            "AuraFlowTransformer2DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
                "joint_attention_dim": 8,
                "caption_projection_dim": 32,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_example_inputs_of_classes_without_a_preset_fit(
    family: str, config: dict[str, Any]
) -> None:
    with torch.device("meta"):
        model = from_diffusers(family, config)
    args, kwargs = example_inputs(model, batch=2)
    with torch.no_grad():
        assert model(*args, **kwargs).sample.shape[0] == 2


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        (
            "UNet2DConditionModel",
            {"class_embed_type": "identity", **ONE_BLOCK},
            "class_embed_type 'identity' is not known",
        ),
        (
            "UNet2DConditionModel",
            {
                "sample_size": 8,
                "addition_embed_type": "text",
                "cross_attention_dim": 64,
                **ONE_BLOCK,
            },
            "addition_embed_type 'text' is not known",
        ),
        ("UNet2DModel", ONE_BLOCK, "no sample_size"),
        (
            "WanTransformer3DModel",
            {"image_dim": 8, "num_layers": 0},
            r"image-to-video Wan \(image_dim 8\)",
        ),
    ],
    ids=["class", "addition", "size", "image"],
)
def test_example_inputs_of_an_unsupported_config_raise(
    family: str, config: dict[str, Any], says: str
) -> None:
    with torch.device("meta"):
        model = from_diffusers(family, config)
    with pytest.raises(ConfigError, match=says):
        example_inputs(model)


def test_example_inputs_of_an_unknown_class_raise() -> None:
    with pytest.raises(ConfigError, match=r"how to call a Linear is not known.*Known: UViT"):
        example_inputs(nn.Linear(2, 2))


def test_example_inputs_of_a_subclass_are_those_of_its_base() -> None:
    class Mine(UViT):
        pass

    assert len(example_inputs(Mine(embed_dim=8, depth=0))[0]) == 2
    assert "Mine" not in MODEL_CLASSES


@pytest.mark.parametrize(
    ("family", "says"),
    [("NoSuchModel", "has no class 'NoSuchModel'"), ("DDPMScheduler", "is not a model")],
)
def test_from_diffusers_of_an_unknown_class_raises(family: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_diffusers(family, {})


def test_preset_without_diffusers_names_the_pip_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_module, "find_spec", lambda name: None)
    with pytest.raises(SparseDMError, match=r'pip install "sparsedm-compiler\[diffusers\]"'):
        preset("sd15")
    preset("uvit-cifar10-small")


def test_importing_models_imports_no_diffusers() -> None:
    code = (
        "import sys, sparsedm_compiler.models as m; m.preset('uvit-cifar10-small'); "
        "sys.exit('diffusers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
