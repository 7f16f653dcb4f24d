"""A small diffusers model on disk, and how to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from tests.oracle import align
from tests.zoo import fill_zeros


def small_unet() -> UNet2DModel:
    """Returns a UNet with one block per side, in eval()."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )
    return fill_zeros(model).eval()


def saved_unet(folder: Path) -> Path:
    """Writes ``small_unet()`` and returns its folder."""
    small_unet().save_pretrained(folder)
    return folder


def run(model: Any) -> Tensor:
    """Returns the prediction for one seeded input."""
    align(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, 8, 8, generator=generator).to(model.device, model.dtype)
    out = model(x, torch.tensor([10]), return_dict=False)[0]
    assert isinstance(out, Tensor)
    return out
