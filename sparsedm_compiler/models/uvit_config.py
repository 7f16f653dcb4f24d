"""The options of a U-ViT."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class UViTConfig:
    """Every option of a U-ViT; the defaults are the authors' CIFAR10 model.

    Attributes:
        img_size: Side of the (latent) image in pixels, a multiple of ``patch_size``.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        embed_dim: Width of a token, a multiple of ``num_heads``.
        depth: Blocks beside the middle one, half of them before it and half behind it.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP in multiples of ``embed_dim``.
        qkv_bias: Whether the query, key and value projections have a bias.
        mlp_time_embed: Whether an MLP processes the time embedding.
        num_classes: Number of classes, 0 for none. Above 0 adds a class token; include the "no
            class" label of classifier-free guidance (1001 on ImageNet).
        clip_dim: Width of a text token, 0 for no text. Not together with ``num_classes``.
        num_clip_token: Text tokens, where ``clip_dim`` is above 0.
        use_checkpoint: Whether the backward pass recomputes every block (gradient checkpointing).
        conv: Whether a 3x3 convolution is the last layer.
        skip: Whether long skip connections join the two halves.
        pos_std: Standard deviation of the initial positions (0.02 as published; tiny models learn
            faster from 0.5).

    Raises:
        ConfigError: A size is out of range, or sizes do not go together.

    Example:
        >>> config = UViTConfig(img_size=64, patch_size=4, num_classes=10)
        >>> config.patches, config.extras
        (256, 2)
    """

    img_size: int = 32
    patch_size: int = 2
    in_chans: int = 3
    embed_dim: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    num_classes: int = 0
    clip_dim: int = 0
    num_clip_token: int = 77
    use_checkpoint: bool = False
    conv: bool = True
    skip: bool = True
    pos_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "in_chans", "embed_dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} of a U-ViT is not >= 1")
        if self.depth < 0:
            raise ConfigError(f"depth {self.depth} of a U-ViT is negative")
        for size, part in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
            if getattr(self, size) % getattr(self, part):
                raise ConfigError(
                    f"{size} {getattr(self, size)} of a U-ViT is not a multiple of "
                    f"{part} {getattr(self, part)}"
                )
        if self.num_classes > 0 and self.clip_dim > 0:
            raise ConfigError(
                f"a U-ViT takes classes (num_classes {self.num_classes}) or text "
                f"(clip_dim {self.clip_dim}), not both: set one of them to 0"
            )

    @property
    def patches(self) -> int:
        """Number of image tokens."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def extras(self) -> int:
        """Number of tokens in front of the image: time, and class or text."""
        return 1 + (self.num_clip_token if self.clip_dim > 0 else int(self.num_classes > 0))


def resolve(config: UViTConfig, options: dict[str, Any]) -> UViTConfig:
    """Returns ``config`` with ``options`` in place of its fields.

    Raises ConfigError for an unknown option.
    """
    known = [field.name for field in fields(UViTConfig)]
    for name in options:
        if name not in known:
            raise ConfigError(f"U-ViT has no option {name!r}; it has {', '.join(known)}")
    return replace(config, **options)
