"""``preset``: the models of the paper and their successors, by name, with inputs to call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, suggest
from ..optional_deps import import_diffusers
from .example_inputs import Call, example_inputs
from .uvit import UViT


@dataclass(frozen=True, slots=True)
class Preset:
    """A published model: ``family`` is "UViT" or a diffusers class, ``config`` its options."""

    about: str
    family: str
    config: Mapping[str, Any]

    def build(self) -> nn.Module:
        """The model, freshly initialised on torch's current device."""
        if self.family == "UViT":
            return UViT(**self.config)
        return from_diffusers(self.family, self.config)

    def inputs(self, model: nn.Module, batch: int = 1) -> Call:
        """(args, kwargs) of one forward at the published resolution."""
        return example_inputs(model, batch=batch)


_SMALL = {"embed_dim": 512, "depth": 12, "num_heads": 8}
_LATENT = {"in_chans": 4, "num_classes": 1001}
_CONV_UNET = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")

PRESETS: Mapping[str, Preset] = {
    "uvit-cifar10-small": Preset("U-ViT-S/2, CIFAR10 32x32", "UViT", _SMALL),
    "uvit-celeba64-small": Preset(
        "U-ViT-S/4, CelebA 64x64", "UViT", {**_SMALL, "img_size": 64, "patch_size": 4}
    ),
    "uvit-imagenet64-mid": Preset(
        "U-ViT-M/4, ImageNet 64x64",
        "UViT",
        {
            "img_size": 64,
            "patch_size": 4,
            "embed_dim": 768,
            "depth": 16,
            "num_heads": 12,
            "num_classes": 1000,
        },
    ),
    "uvit-imagenet256-large": Preset(
        "U-ViT-L/2, ImageNet 256x256 latents",
        "UViT",
        {**_LATENT, "embed_dim": 1024, "depth": 20, "num_heads": 16},
    ),
    "uvit-imagenet256-huge": Preset(
        "U-ViT-H/2, ImageNet 256x256 latents",
        "UViT",
        {**_LATENT, "embed_dim": 1152, "depth": 28, "num_heads": 16, "conv": False},
    ),
    "uvit-mscoco-small": Preset(
        "U-ViT-S/2, MS-COCO 256x256 latents, CLIP text",
        "UViT",
        {**_SMALL, "in_chans": 4, "clip_dim": 768, "num_clip_token": 77},
    ),
    "ddpm-cifar10": Preset(
        "DDPM UNet, CIFAR10 32x32",
        "UNet2DModel",
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": _CONV_UNET,
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
            "norm_eps": 1e-6,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
        },
    ),
    "sd15": Preset(
        "Stable Diffusion 1.5 UNet, 512px",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
    ),
    "sdxl": Preset(
        "Stable Diffusion XL base UNet, 1024px",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "dit-xl-2": Preset(
        "DiT-XL/2, ImageNet 256x256 latents",
        "DiTTransformer2DModel",
        {"sample_size": 32, "out_channels": 8},
    ),
    "sd3-medium": Preset(
        "Stable Diffusion 3 medium, 1024px",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "flux1": Preset("FLUX.1-dev, 1024px", "FluxTransformer2DModel", {"guidance_embeds": True}),
}
"""Every model that ``preset`` knows."""


def preset(
    name: str, device: str | torch.device = "meta", batch: int = 1
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """(model, args, kwargs) of a named model, with random weights (none on the meta device).

    Raises ConfigError for an unknown name, or where diffusers is needed and not installed.

    >>> model, args, kwargs = preset("uvit-cifar10-small")
    >>> sum(param.numel() for param in model.parameters())
    44255328
    >>> model(*args, **kwargs).shape
    torch.Size([1, 3, 32, 32])
    """
    chosen = find(name)
    with torch.device(device):
        model = chosen.build()
    args, kwargs = chosen.inputs(model, batch)
    return model, args, kwargs


def find(name: str) -> Preset:
    """The preset of that name. Raises ConfigError that suggests close ones."""
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; {suggest(name, PRESETS, 'known:')}")
    return PRESETS[name]


def from_diffusers(family: str, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised diffusers model of class ``family``. Raises ConfigError."""
    diffusers = import_diffusers()
    try:
        cls: Any = getattr(diffusers, family)
    except AttributeError:
        raise ConfigError(f"diffusers {diffusers.__version__} has no class {family!r}") from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"diffusers.{family} is not a model")
    model: nn.Module = cls.from_config(dict(config))  # type: ignore[attr-defined]
    return model
