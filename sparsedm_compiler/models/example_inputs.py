"""``example_inputs``: what a known diffusion model is called with, at a size of your choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of one forward."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What to make: ``batch`` samples of latent side ``size``, ``tokens`` of text, ``frames``.

    None means what the published model is used with. Random values come from torch's global
    generator; on the meta device there are none.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    size: int | None = None
    tokens: int | None = None
    frames: int | None = None

    def side(self, default: int | None) -> int:
        """The latent side: the one asked for, or the model's own."""
        side = self.size if self.size is not None else default
        if side is None:
            raise ConfigError("this model's config has no sample_size: say which size to feed")
        return side

    def noise(self, *shape: int) -> Tensor:
        """Standard normal [batch, *shape]."""
        return torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)

    def text(self, tokens: int, width: int) -> Tensor:
        """Standard normal [batch, tokens asked for or ``tokens``, width]."""
        return self.noise(self.tokens or tokens, width)

    def steps(self) -> Tensor:
        """Integer timesteps [batch], each its own."""
        return 500 + 7 * torch.arange(self.batch, device=self.device)

    def labels(self, classes: int) -> Tensor:
        """Class labels [batch]."""
        return torch.arange(self.batch, device=self.device) % classes


def _uvit(config: Any, ask: Ask) -> Call:
    image = ask.noise(config.in_chans, config.img_size, config.img_size)
    extra: dict[str, Any] = {}
    if config.num_classes > 0:
        extra["y"] = ask.labels(config.num_classes)
    if config.clip_dim > 0:
        extra["context"] = ask.noise(config.num_clip_token, config.clip_dim)
    return (image, ask.steps()), extra


def _unet(config: Any, ask: Ask) -> Call:
    side = ask.side(config.sample_size)
    extra: dict[str, Any] = {}
    if config.num_class_embeds is not None:
        extra["class_labels"] = ask.labels(config.num_class_embeds)
    return (ask.noise(config.in_channels, side, side), ask.steps()), extra


SDXL_IDS = 6
"""Original size, crop and target size: the numbers SDXL embeds beside the pooled text."""


def _unet_condition(config: Any, ask: Ask) -> Call:
    for name in ("class_embed_type", "encoder_hid_dim_type"):
        if config[name] is not None:
            raise ConfigError(f"a UNet2DConditionModel with {name} {config[name]!r} is not known")
    side, width = ask.side(config.sample_size), config.cross_attention_dim
    args = (ask.noise(config.in_channels, side, side), ask.steps(), ask.text(77, width))
    extra: dict[str, Any] = {}
    if config.num_class_embeds is not None:
        extra["class_labels"] = ask.labels(config.num_class_embeds)
    if config.addition_embed_type == "text_time":
        ids = torch.full((ask.batch, SDXL_IDS), 1024.0, device=ask.device, dtype=ask.dtype)
        wide = config.projection_class_embeddings_input_dim
        pooled = ask.noise(wide - SDXL_IDS * config.addition_time_embed_dim)
        extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    elif config.addition_embed_type is not None:
        raise ConfigError(
            f"a UNet2DConditionModel with addition_embed_type {config.addition_embed_type!r} "
            f"is not known"
        )
    return args, extra


def _dit(config: Any, ask: Ask) -> Call:
    side = ask.side(config.sample_size)
    extra = {"timestep": ask.steps(), "class_labels": ask.labels(config.num_embeds_ada_norm)}
    return (ask.noise(config.in_channels, side, side),), extra


def _sd3(config: Any, ask: Ask) -> Call:
    side = ask.side(config.sample_size)
    extra = {
        "encoder_hidden_states": ask.text(77 + 256, config.joint_attention_dim),
        "pooled_projections": ask.noise(config.pooled_projection_dim),
        "timestep": ask.steps(),
    }
    return (ask.noise(config.in_channels, side, side),), extra


def _flux(config: Any, ask: Ask) -> Call:
    side = ask.side(128) // 2
    text = ask.text(512, config.joint_attention_dim)
    grid = torch.zeros(side, side, 3, device=ask.device, dtype=ask.dtype)
    grid[..., 1] += torch.arange(side, device=ask.device, dtype=ask.dtype)[:, None]
    grid[..., 2] += torch.arange(side, device=ask.device, dtype=ask.dtype)
    extra = {
        "encoder_hidden_states": text,
        "pooled_projections": ask.noise(config.pooled_projection_dim),
        "timestep": ask.steps().to(ask.dtype) / 1000,
        "img_ids": grid.reshape(-1, 3),
        "txt_ids": torch.zeros(text.shape[1], 3, device=ask.device, dtype=ask.dtype),
    }
    if config.guidance_embeds:
        extra["guidance"] = torch.full((ask.batch,), 3.5, device=ask.device, dtype=ask.dtype)
    return (ask.noise(side * side, config.in_channels),), extra


def _pixart(config: Any, ask: Ask) -> Call:
    side = ask.side(config.sample_size)
    text = ask.text(120, config.caption_channels)
    use = config.use_additional_conditions
    micro: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if use or (use is None and config.sample_size == 128):
        pixels = torch.full((ask.batch, 2), 1024.0, device=ask.device, dtype=ask.dtype)
        micro = {"resolution": pixels, "aspect_ratio": torch.ones_like(pixels[:, :1])}
    extra = {
        "encoder_hidden_states": text,
        "timestep": ask.steps(),
        "added_cond_kwargs": micro,
        "encoder_attention_mask": torch.ones(text.shape[:2], device=ask.device, dtype=ask.dtype),
    }
    return (ask.noise(config.in_channels, side, side),), extra


def _ltx(config: Any, ask: Ask) -> Call:
    height, width = (16, 24) if ask.size is None else (ask.size, ask.size)
    frames = ask.frames or 16
    text = ask.text(128, config.caption_channels)
    extra = {
        "encoder_hidden_states": text,
        "timestep": ask.steps(),
        "encoder_attention_mask": torch.ones(text.shape[:2], device=ask.device, dtype=ask.dtype),
        "num_frames": frames,
        "height": height,
        "width": width,
    }
    return (ask.noise(frames * height * width, config.in_channels),), extra


def _wan(config: Any, ask: Ask) -> Call:
    if config.image_dim is not None:
        raise ConfigError(f"an image-to-video Wan (image_dim {config.image_dim}) is not known")
    height, width = (60, 104) if ask.size is None else (ask.size, ask.size)
    video = ask.noise(config.in_channels, ask.frames or 21, height, width)
    extra = {"timestep": ask.steps(), "encoder_hidden_states": ask.text(512, config.text_dim)}
    return (video,), extra


def _sana(config: Any, ask: Ask) -> Call:
    side = ask.side(config.sample_size)
    extra = {
        "encoder_hidden_states": ask.text(300, config.caption_channels),
        "timestep": ask.steps(),
    }
    if config.guidance_embeds:
        extra["guidance"] = torch.full((ask.batch,), 4.5, device=ask.device, dtype=ask.dtype)
    return (ask.noise(config.in_channels, side, side),), extra


def _auraflow(config: Any, ask: Ask) -> Call:
    side = ask.side(config.sample_size)
    extra = {
        "encoder_hidden_states": ask.text(256, config.joint_attention_dim),
        "timestep": ask.steps().to(ask.dtype) / 1000,
    }
    return (ask.noise(config.in_channels, side, side),), extra


FEEDS: Mapping[str, Callable[[Any, Ask], Call]] = {
    "UViT": _uvit,
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet_condition,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "LTXVideoTransformer3DModel": _ltx,
    "WanTransformer3DModel": _wan,
    "SanaTransformer2DModel": _sana,
    "AuraFlowTransformer2DModel": _auraflow,
}
"""How to feed each model class that is known by name."""


def example_inputs(
    model: nn.Module,
    *,
    batch: int = 1,
    size: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
) -> Call:
    """(args, kwargs) for ``model``, on its device and in its dtype.

    ``size``: side of the (latent) image in pixels; ``tokens``: length of the text; ``frames``: of
    a video. None: as published. Raises ConfigError for a class this table does not know.

    >>> from sparsedm_compiler.models import UViT
    >>> args, kwargs = example_inputs(UViT(embed_dim=8, depth=0, num_classes=10), batch=2)
    >>> [list(x.shape) for x in args], kwargs["y"]
    ([[2, 3, 32, 32], [2]], tensor([0, 1]))
    """
    for base in type(model).__mro__:
        if base.__name__ in FEEDS:
            break
    else:
        raise ConfigError(
            f"how to call a {type(model).__name__} is not known; give its inputs yourself. "
            f"Known: {', '.join(FEEDS)}"
        )
    weight = next(param for param in model.parameters() if param.is_floating_point())
    ask = Ask(weight.device, weight.dtype, batch, size, tokens, frames)
    return FEEDS[base.__name__](model.config, ask)
