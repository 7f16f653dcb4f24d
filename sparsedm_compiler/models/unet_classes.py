"""U-shaped networks: U-ViT (Bao et al. 2023) and the UNets of diffusers."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .model_class import ExampleCall, InputRequest, ModelClass

SDXL_IDS = 6
"""Original size, crop and target size: the numbers SDXL embeds beside the pooled text."""


def make_uvit_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns (image, timesteps), with labels or text where the model takes them."""
    image = request.noise(config.in_chans, config.img_size, config.img_size)
    extra: dict[str, Any] = {}
    if config.num_classes > 0:
        extra["y"] = request.labels(config.num_classes)
    if config.clip_dim > 0:
        extra["context"] = request.noise(config.num_clip_token, config.clip_dim)
    return (image, request.steps()), extra


_SMALL = {"embed_dim": 512, "depth": 12, "num_heads": 8}
_LATENT = {"in_chans": 4, "num_classes": 1001}

UVIT = ModelClass(
    "UViT",
    make_uvit_inputs,
    presets={
        "uvit-cifar10-small": ("U-ViT-S/2, CIFAR10 32x32", _SMALL),
        "uvit-celeba64-small": (
            "U-ViT-S/4, CelebA 64x64",
            {**_SMALL, "img_size": 64, "patch_size": 4},
        ),
        "uvit-imagenet64-mid": (
            "U-ViT-M/4, ImageNet 64x64",
            {
                "img_size": 64,
                "patch_size": 4,
                "embed_dim": 768,
                "depth": 16,
                "num_heads": 12,
                "num_classes": 1000,
            },
        ),
        "uvit-imagenet256-large": (
            "U-ViT-L/2, ImageNet 256x256 latents",
            {**_LATENT, "embed_dim": 1024, "depth": 20, "num_heads": 16},
        ),
        "uvit-imagenet256-huge": (
            "U-ViT-H/2, ImageNet 256x256 latents",
            {**_LATENT, "embed_dim": 1152, "depth": 28, "num_heads": 16, "conv": False},
        ),
        "uvit-mscoco-small": (
            "U-ViT-S/2, MS-COCO 256x256 latents, CLIP text",
            {**_SMALL, "in_chans": 4, "clip_dim": 768, "num_clip_token": 77},
        ),
    },
)


def make_unet_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns (image, timesteps), with labels where the model takes them."""
    side = request.side(config.sample_size)
    extra: dict[str, Any] = {}
    if config.num_class_embeds is not None:
        extra["class_labels"] = request.labels(config.num_class_embeds)
    return (request.noise(config.in_channels, side, side), request.steps()), extra


UNET = ModelClass(
    "UNet2DModel",
    make_unet_inputs,
    presets={
        "ddpm-cifar10": (
            "DDPM UNet, CIFAR10 32x32",
            {
                "sample_size": 32,
                "block_out_channels": (128, 256, 256, 256),
                "down_block_types": (
                    "DownBlock2D",
                    "AttnDownBlock2D",
                    "DownBlock2D",
                    "DownBlock2D",
                ),
                "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": None,
                "norm_eps": 1e-6,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "downsample_padding": 0,
            },
        ),
    },
)


def make_unet_condition_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns (latents, timesteps, text), with SDXL's pooled text and sizes where it takes them.

    Raises ConfigError for embeddings of another kind.
    """
    for name in ("class_embed_type", "encoder_hid_dim_type"):
        if config[name] is not None:
            raise ConfigError(f"a UNet2DConditionModel with {name} {config[name]!r} is not known")
    side, width = request.side(config.sample_size), config.cross_attention_dim
    latents = request.noise(config.in_channels, side, side)
    args = (latents, request.steps(), request.text(77, width))
    extra: dict[str, Any] = {}
    if config.num_class_embeds is not None:
        extra["class_labels"] = request.labels(config.num_class_embeds)
    if config.addition_embed_type == "text_time":
        ids = request.full(1024.0, SDXL_IDS)
        wide = config.projection_class_embeddings_input_dim
        pooled = request.noise(wide - SDXL_IDS * config.addition_time_embed_dim)
        extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    elif config.addition_embed_type is not None:
        raise ConfigError(
            f"a UNet2DConditionModel with addition_embed_type {config.addition_embed_type!r} "
            f"is not known"
        )
    return args, extra


UNET_CONDITION = ModelClass(
    "UNet2DConditionModel",
    make_unet_condition_inputs,
    presets={
        "sd15": (
            "Stable Diffusion 1.5 UNet, 512px",
            {"sample_size": 64, "cross_attention_dim": 768},
        ),
        "sdxl": (
            "Stable Diffusion XL base UNet, 1024px",
            {
                "sample_size": 128,
                "cross_attention_dim": 2048,
                "attention_head_dim": (5, 10, 20),
                "block_out_channels": (320, 640, 1280),
                "down_block_types": (
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
    },
)

UNET_CLASSES = (UVIT, UNET, UNET_CONDITION)
"""The rows of this file."""
