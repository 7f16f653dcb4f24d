"""``FAMILIES``: one tiny, seeded model per kind of diffusion network, for batteries of tests.

Each runs a forward in a few milliseconds, has at least two blocks (so long skips, cross-attention
and shared conditioning exist), and widths that are multiples of 8 wherever the family allows it.
No parameter is zero, so gradients reach everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsedm_compiler.models import UViT, example_inputs
from sparsedm_compiler.models.presets import from_diffusers

Call = tuple[tuple[Any, ...], dict[str, Any]]

SIDE = 8
TOKENS = 6
FRAMES = 2


@dataclass(frozen=True)
class Family:
    """A kind of network, with the features that its forward supports.

    Attributes:
        name: Its id in tests.
        create: Builds the model.
        timestep: Position (int) or name (str) of the timestep in a call.
        second_size: Another resolution, None where positions are learned.
        int_timestep: The timestep may be a Python int.
        return_dict: The forward takes ``return_dict``, and returns a 1-tuple when it is False.
        checkpointing: ``model.enable_gradient_checkpointing()`` works.
        random_in_train: A forward in train() draws random numbers (class dropout).
        unread: Parameters that the published architecture computes with in vain; they never get a
            gradient.
    """

    name: str
    create: Callable[[], nn.Module]
    timestep: int | str
    second_size: int | None = 2 * SIDE
    int_timestep: bool = False
    return_dict: bool = True
    checkpointing: bool = True
    random_in_train: bool = False
    unread: frozenset[str] = frozenset()

    def build(self, seed: int = 0) -> nn.Module:
        """Returns the model, in eval(), with the same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return fill_zeros(self.create()).eval()

    def inputs(
        self, model: nn.Module, batch: int = 1, size: int | None = None, seed: int = 0
    ) -> Call:
        """Returns (args, kwargs) of a forward on the model's device, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            return example_inputs(
                model, batch=batch, size=size or SIDE, tokens=TOKENS, frames=FRAMES
            )

    def make(self, batch: int = 1, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...], dict]:
        """Returns (model, args, kwargs)."""
        model = self.build(seed)
        return model, *self.inputs(model, batch, seed=seed)

    def at(self, call: Call, timestep: Tensor | float) -> Call:
        """Returns the same call at another timestep."""
        args, kwargs = call
        if isinstance(self.timestep, str):
            return args, {**kwargs, self.timestep: timestep}
        position = self.timestep
        return (*args[:position], timestep, *args[position + 1 :]), kwargs


def sample_of(output: Any) -> Tensor:
    """Returns the prediction of an output: a tensor, a 1-tuple, or an object with ``sample``."""
    if isinstance(output, Tensor):
        return output
    sample = output[0] if isinstance(output, tuple) else output.sample
    assert isinstance(sample, Tensor)
    return sample


@torch.no_grad()
def fill_zeros(model: nn.Module) -> nn.Module:
    """Draws every all-zero parameter anew with a small scale, in place; returns the model."""
    for param in model.parameters():
        if not param.any():
            param.normal_(std=0.02)
    return model


def _uvit() -> nn.Module:
    return UViT(
        img_size=SIDE,
        in_chans=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_time_embed=True,
        num_classes=10,
        pos_std=0.5,
    )


_unet = partial(
    from_diffusers,
    "UNet2DModel",
    {
        "sample_size": SIDE,
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    },
)
_unet_condition = partial(
    from_diffusers,
    "UNet2DConditionModel",
    {
        "sample_size": SIDE,
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
)
_dit = partial(
    from_diffusers,
    "DiTTransformer2DModel",
    {
        "sample_size": SIDE,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_embeds_ada_norm": 10,
    },
)
_sd3 = partial(
    from_diffusers,
    "SD3Transformer2DModel",
    {
        "sample_size": SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
    },
)
_flux = partial(
    from_diffusers,
    "FluxTransformer2DModel",
    {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    },
)
_pixart = partial(
    from_diffusers,
    "PixArtTransformer2DModel",
    {
        "sample_size": SIDE,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "use_additional_conditions": False,
    },
)
_wan = partial(
    from_diffusers,
    "WanTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    },
)

_LAST = "transformer_blocks.1.attn"
_SD3_UNREAD = frozenset(
    {f"{_LAST}.add_q_proj.weight", f"{_LAST}.add_q_proj.bias", f"{_LAST}.norm_added_q.weight"}
)
"""The last block of SD3 makes text queries, but its text output is dropped."""

FAMILIES: tuple[Family, ...] = (
    Family("uvit", _uvit, 1, second_size=None, int_timestep=True, return_dict=False),
    Family("unet", _unet, 1, int_timestep=True),
    Family("unet_condition", _unet_condition, 1, int_timestep=True),
    Family("dit", _dit, "timestep", random_in_train=True),
    Family("sd3", _sd3, "timestep", unread=_SD3_UNREAD),
    Family("flux", _flux, "timestep"),
    Family("pixart", _pixart, "timestep"),
    Family("wan", _wan, "timestep"),
)
"""Ids for parametrize: ``ids=lambda family: family.name``."""
