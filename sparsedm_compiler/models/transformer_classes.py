"""Diffusion transformers of diffusers, for images and video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .model_class import ExampleCall, InputRequest, ModelClass


def make_dit_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns latents, timesteps and class labels (Peebles & Xie 2023)."""
    side = request.side(config.sample_size)
    labels = request.labels(config.num_embeds_ada_norm)
    extra = {"timestep": request.steps(), "class_labels": labels}
    return (request.noise(config.in_channels, side, side),), extra


DIT = ModelClass(
    "DiTTransformer2DModel",
    make_dit_inputs,
    presets={
        "dit-xl-2": (
            "DiT-XL/2, ImageNet 256x256 latents",
            {"sample_size": 32, "out_channels": 8},
        ),
    },
)


def make_sd3_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns latents, text of CLIP and T5, pooled text and timesteps."""
    side = request.side(config.sample_size)
    extra = {
        "encoder_hidden_states": request.text(77 + 256, config.joint_attention_dim),
        "pooled_projections": request.noise(config.pooled_projection_dim),
        "timestep": request.steps(),
    }
    return (request.noise(config.in_channels, side, side),), extra


SD3 = ModelClass(
    "SD3Transformer2DModel",
    make_sd3_inputs,
    presets={
        "sd3-medium": (
            "Stable Diffusion 3 medium, 1024px",
            {
                "sample_size": 128,
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 192,
            },
        ),
    },
)


def make_flux_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns packed latents [batch, tokens, C], text, times in 0..1 and positions."""
    side = request.side(128) // 2
    text = request.text(512, config.joint_attention_dim)
    grid = torch.zeros(side, side, 3, device=request.device, dtype=request.dtype)
    grid[..., 1] += torch.arange(side, device=request.device, dtype=request.dtype)[:, None]
    grid[..., 2] += torch.arange(side, device=request.device, dtype=request.dtype)
    extra = {
        "encoder_hidden_states": text,
        "pooled_projections": request.noise(config.pooled_projection_dim),
        "timestep": request.unit_times(),
        "img_ids": grid.reshape(-1, 3),
        "txt_ids": torch.zeros(text.shape[1], 3, device=request.device, dtype=request.dtype),
    }
    if config.guidance_embeds:
        extra["guidance"] = request.full(3.5)
    return (request.noise(side * side, config.in_channels),), extra


FLUX = ModelClass(
    "FluxTransformer2DModel",
    make_flux_inputs,
    presets={"flux1": ("FLUX.1-dev, 1024px", {"guidance_embeds": True})},
)


def make_pixart_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns latents, text with its mask, timesteps and, for 1024px, resolution conditions."""
    side = request.side(config.sample_size)
    text = request.text(120, config.caption_channels)
    use = config.use_additional_conditions
    micro: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if use or (use is None and config.sample_size == 128):
        pixels = request.full(1024.0, 2)
        micro = {"resolution": pixels, "aspect_ratio": torch.ones_like(pixels[:, :1])}
    extra = {
        "encoder_hidden_states": text,
        "timestep": request.steps(),
        "added_cond_kwargs": micro,
        "encoder_attention_mask": request.full(1.0, text.shape[1]),
    }
    return (request.noise(config.in_channels, side, side),), extra


def make_ltx_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns packed video latents [batch, tokens, C], text with its mask, timesteps and sizes."""
    height, width = (16, 24) if request.size is None else (request.size, request.size)
    frames = request.frames or 16
    text = request.text(128, config.caption_channels)
    extra = {
        "encoder_hidden_states": text,
        "timestep": request.steps(),
        "encoder_attention_mask": request.full(1.0, text.shape[1]),
        "num_frames": frames,
        "height": height,
        "width": width,
    }
    return (request.noise(frames * height * width, config.in_channels),), extra


def make_wan_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns video latents [batch, C, frames, h, w], timesteps and text.

    Raises ConfigError for an image-to-video model.
    """
    if config.image_dim is not None:
        raise ConfigError(f"an image-to-video Wan (image_dim {config.image_dim}) is not known")
    height, width = (60, 104) if request.size is None else (request.size, request.size)
    video = request.noise(config.in_channels, request.frames or 21, height, width)
    text = request.text(512, config.text_dim)
    return (video,), {"timestep": request.steps(), "encoder_hidden_states": text}


def make_sana_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns latents, text, timesteps and, where the model embeds it, a guidance scale."""
    side = request.side(config.sample_size)
    extra = {
        "encoder_hidden_states": request.text(300, config.caption_channels),
        "timestep": request.steps(),
    }
    if config.guidance_embeds:
        extra["guidance"] = request.full(4.5)
    return (request.noise(config.in_channels, side, side),), extra


def make_auraflow_inputs(config: Any, request: InputRequest) -> ExampleCall:
    """Returns latents, text and times in 0..1."""
    side = request.side(config.sample_size)
    extra = {
        "encoder_hidden_states": request.text(256, config.joint_attention_dim),
        "timestep": request.unit_times(),
    }
    return (request.noise(config.in_channels, side, side),), extra


TRANSFORMER_CLASSES = (
    DIT,
    SD3,
    FLUX,
    ModelClass("PixArtTransformer2DModel", make_pixart_inputs),
    ModelClass("LTXVideoTransformer3DModel", make_ltx_inputs),
    ModelClass("WanTransformer3DModel", make_wan_inputs),
    ModelClass("SanaTransformer2DModel", make_sana_inputs),
    ModelClass("AuraFlowTransformer2DModel", make_auraflow_inputs),
)
"""The rows of this file."""
