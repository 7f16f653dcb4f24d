"""Images of any source, by number: tensors, folders, archives, datasets, latents."""

from __future__ import annotations

from .base import Batch, ImageData, Wanted
from .condition import Condition
from .condition import rows as condition_rows
from .encode import decode_latents, encode_latents, open_autoencoder
from .hub import HubData
from .latents import LatentData
from .opening import open_data
from .tensors import TensorData

__all__ = [
    "Batch",
    "Condition",
    "HubData",
    "ImageData",
    "LatentData",
    "TensorData",
    "Wanted",
    "condition_rows",
    "decode_latents",
    "encode_latents",
    "open_autoencoder",
    "open_data",
]
