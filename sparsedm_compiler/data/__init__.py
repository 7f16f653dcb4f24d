"""Images of any source, by number: tensors, folders, archives, datasets, latents."""

from __future__ import annotations

from ..optional_deps import require_extra

with require_extra("reading images", "train"):
    from ..diffusion.condition import Condition
    from ..diffusion.condition import take_rows as condition_rows
    from ..diffusion.image_batches import Batch
    from .encode_latents import decode_latents, encode_latents, open_autoencoder
    from .hub import HubData
    from .image_data import ImageData, ReadOptions
    from .latents import LatentData
    from .open_data import open_data
    from .tensors import TensorData

__all__ = [
    "Batch",
    "Condition",
    "HubData",
    "ImageData",
    "LatentData",
    "ReadOptions",
    "TensorData",
    "condition_rows",
    "decode_latents",
    "encode_latents",
    "open_autoencoder",
    "open_data",
]
