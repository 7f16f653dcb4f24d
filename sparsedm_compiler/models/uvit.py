"""The reference U-ViT (Bao et al. 2023, "All are Worth Words"), from unconditional to text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import DataError
from .uvit_config import UViTConfig, resolve

MAX_PERIOD = 10000.0


class PatchEmbed(nn.Module):
    """Patch embedding [B, C, H, W] -> [B, patches, D], row by row."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Self-attention; the 3D outputs of qkv are [3, heads, D / heads]."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, -1)  # heads may have been narrowed
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class Mlp(nn.Module):
    """The MLP fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block that may first merge a long skip connection."""

    def __init__(self, config: UViTConfig, *, skip: bool = False) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.num_heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            if skip is None:
                raise DataError("a U-ViT block with skip_linear was called without its skip")
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class UViT(nn.Module):
    """U-ViT: a transformer with long skip connections that predicts the noise in an image.

    Parameter names and shapes are those of the published checkpoints (Bao et al. 2023).
    ``model.config`` keeps the options.

    Args:
        config: The options; None for the defaults.
        **options: Fields of ``UViTConfig``, which win over those of ``config``.

    Raises:
        ConfigError: An option does not exist, or the options do not go together.

    Example:
        >>> model = UViT(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=10)
        >>> model(torch.zeros(3, 1, 8, 8), timesteps=7, y=torch.tensor([0, 1, 9])).shape
        torch.Size([3, 1, 8, 8])
        >>> model.config.patches
        16
    """

    def __init__(self, config: UViTConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = resolve(config or UViTConfig(), options)
        self.use_checkpoint = config.use_checkpoint
        self._checkpoint: Callable[..., Any] | None = None
        dim, half = config.embed_dim, config.depth // 2
        self.patch_embed = PatchEmbed(config)
        self.time_embed = (
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
            if config.mlp_time_embed
            else nn.Identity()
        )
        if config.num_classes > 0:
            self.label_emb = nn.Embedding(config.num_classes, dim)
        if config.clip_dim > 0:
            self.context_embed = nn.Linear(config.clip_dim, dim)
        self.pos_embed = nn.Parameter(torch.empty(1, config.extras + config.patches, dim))
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(half))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, skip=config.skip) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * config.in_chans)
        channels = config.in_chans
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if config.conv else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws positions and linear weights from truncated normals, with biases of zero."""
        nn.init.trunc_normal_(self.pos_embed, std=self.config.pos_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None
    ) -> None:
        """Recomputes every block in the backward pass instead of keeping its activations.

        Args:
            gradient_checkpointing_func: Called with a block and its inputs, as in diffusers; None
                is torch's ``checkpoint``.
        """
        self.use_checkpoint = True
        self._checkpoint = gradient_checkpointing_func

    def disable_gradient_checkpointing(self) -> None:
        """Keeps the activations of every block again."""
        self.use_checkpoint, self._checkpoint = False, None

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | float,
        y: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Predicts the noise in a batch of images.

        Args:
            x: Noisy images [B, in_chans, img_size, img_size].
            timesteps: A number, or a tensor [] or [B], in 0..1000.
            y: Class labels [B], if and only if the model has classes.
            context: Text tokens [B, num_clip_token, clip_dim], if and only if the model has text.

        Returns:
            The prediction, shaped like ``x``.

        Raises:
            DataError: An input does not fit the model.
        """
        self._check(x, y, context)
        tokens = self._tokens(x, timesteps, y, context) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = self._run(block, tokens)
            skips.append(tokens)
        tokens = self._run(self.mid_block, tokens)
        for block in self.out_blocks:
            tokens = self._run(block, tokens, skips.pop())
        tokens = self.decoder_pred(self.norm(tokens))
        image = unpatchify(tokens[:, self.config.extras :], self.config)
        return image if self.final_layer is None else self.final_layer(image)

    def _tokens(
        self, x: Tensor, timesteps: Tensor | float, y: Tensor | None, context: Tensor | None
    ) -> Tensor:
        """Returns the tokens [class, time, patches] or [time, text, patches]."""
        patches = self.patch_embed(x)
        wave = embed_timesteps(expand_timesteps(timesteps, x), self.config.embed_dim).to(
            self.pos_embed.dtype
        )
        time = self.time_embed(wave).unsqueeze(1)
        if y is not None:
            return torch.cat([self.label_emb(y).unsqueeze(1), time, patches], dim=1)
        if context is not None:
            return torch.cat([time, self.context_embed(context), patches], dim=1)
        return torch.cat([time, patches], dim=1)

    def _run(self, block: nn.Module, *args: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            if self._checkpoint is not None:
                return self._checkpoint(block, *args)  # type: ignore[no-any-return]
            return checkpoint(block, *args, use_reentrant=False)  # type: ignore[no-any-return]
        out: Tensor = block(*args)
        return out

    def _check(self, x: Tensor, y: Tensor | None, context: Tensor | None) -> None:
        config = self.config
        image = (config.in_chans, config.img_size, config.img_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != image:
            raise DataError(f"images {list(x.shape)} are not [B, {', '.join(map(str, image))}]")
        _check_condition("class labels y", y, config.num_classes > 0, (x.shape[0],))
        text = (x.shape[0], config.num_clip_token, config.clip_dim)
        _check_condition("text tokens context", context, config.clip_dim > 0, text)


def _check_condition(
    label: str, tensor: Tensor | None, needed: bool, shape: tuple[int, ...]
) -> None:
    if tensor is None:
        if needed:
            raise DataError(f"this U-ViT needs {label}, a tensor {list(shape)}; got none")
        return
    if not needed:
        raise DataError(f"this U-ViT was built without {label}, but the call gives them")
    if tuple(tensor.shape) != shape:
        raise DataError(f"{label} {list(tensor.shape)} are not {list(shape)}")


def expand_timesteps(timesteps: Tensor | float, x: Tensor) -> Tensor:
    """Expands ``timesteps`` to a tensor [B] on the device of ``x`` [B, ...].

    Raises DataError for a tensor that is neither one number nor [B].
    """
    batch = x.shape[0]
    if not isinstance(timesteps, Tensor):
        return torch.full((batch,), float(timesteps), device=x.device)
    if timesteps.ndim > 1 or timesteps.numel() not in (1, batch):
        raise DataError(f"timesteps {list(timesteps.shape)} are neither one number nor [{batch}]")
    return timesteps.to(x.device).expand(batch)


def embed_timesteps(timesteps: Tensor, dim: int) -> Tensor:
    """Returns the sinusoidal embedding [B] -> [B, dim], float32 (Vaswani et al. 2017).

    Cosines, then sines, of dim // 2 frequencies from 1 down.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) / half * steps)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def unpatchify(tokens: Tensor, config: UViTConfig) -> Tensor:
    """Puts patches back: [B, patches, p * p * C] -> [B, C, H, W].

    A token holds its pixels row by row, C innermost.
    """
    side, patch = config.img_size // config.patch_size, config.patch_size
    pixels = tokens.reshape(-1, side, side, patch, patch, config.in_chans)
    size = (-1, config.in_chans, config.img_size, config.img_size)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(size)
