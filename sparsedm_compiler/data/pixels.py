"""Pixels: decoding by Pillow, cropping, resizing, and scaling to [-1, 1]."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

CHANNELS = (1, 3)
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
"""Errors that Pillow raises for files that are no image, or half of one."""


def scale_pixels(pixels: Tensor) -> Tensor:
    """Scales uint8 ``pixels`` to float32 in [-1, 1]; converts floating-point ones to float32."""
    if pixels.dtype == torch.uint8:
        return pixels.float().div_(127.5).sub_(1)
    return pixels.float()


def pixels_from_array(images: np.ndarray, source: str) -> Tensor:
    """Returns an array of images as a tensor [n, C, h, w], uint8 or float32 in [-1, 1].

    The array is [n, h, w, C], [n, C, h, w] or [n, h, w] with C = 1 or 3; where either axis could
    be C it is the last. ``source`` names the data in errors. Raises DataError for anything else.
    """
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in CHANNELS:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in CHANNELS:
        raise DataError(
            f"{source}: images {list(images.shape)} are not [n, h, w, 1 or 3], [n, 1 or 3, h, w] "
            "or [n, h, w]"
        )
    if not images.size:
        raise DataError(f"{source} holds no images")
    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images))
    if images.dtype.kind != "f":
        raise DataError(
            f"{source}: images of type {images.dtype} are neither uint8 nor floats in [-1, 1]"
        )
    floats = np.ascontiguousarray(images, dtype=np.float32)
    low, high = float(floats.min()), float(floats.max())
    if not (-1 <= low < 0 and high <= 1):
        raise DataError(
            f"{source}: floats from {low:.3g} to {high:.3g} are not images in [-1, 1]; "
            "scale them (0..1: x * 2 - 1; 0..255: x / 127.5 - 1) or store uint8"
        )
    return torch.from_numpy(floats)


def crop_square(image: Image.Image, size: int) -> Image.Image:
    """Crops the middle square of ``image`` and resizes it to side ``size``.

    It averages over boxes where the square is a whole multiple of ``size``, and uses Lanczos
    otherwise. Images smaller than ``size`` are enlarged, since a size must hold for all.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if side != max(image.size):
        image = image.crop((left, top, left + side, top + side))
    if side == size:
        return image
    filter_ = Image.Resampling.LANCZOS if side % size else Image.Resampling.BOX
    return image.resize((size, size), filter_)


def resize_pixels(pixels: Tensor, size: int | None) -> Tensor:
    """Applies ``crop_square`` to [n, C, h, w], uint8 or float32 in [-1, 1]; None leaves them."""
    if size is None or pixels.shape[2:] == (size, size):
        return pixels
    planes = pixels.flatten(0, 1).numpy()
    small = np.stack([np.asarray(crop_square(Image.fromarray(plane), size)) for plane in planes])
    resized = torch.from_numpy(small).reshape(*pixels.shape[:2], size, size)
    return resized.clamp_(-1, 1) if resized.is_floating_point() else resized  # Lanczos overshoots


def decode_image(name: str, file: Path | BytesIO, size: int | None) -> np.ndarray:
    """Decodes an image file to uint8 [h, w, 3], upright, cropped and resized to ``size`` if any.

    ``name`` names the file in errors. Raises DataError where it cannot be read.
    """
    try:
        with Image.open(file) as image:
            upright = convert_to_rgb(ImageOps.exif_transpose(image))
            return np.array(upright if size is None else crop_square(upright, size))
    except UNREADABLE as error:
        raise DataError(
            f"{name} cannot be read as an image: {error}; mend it or take it out"
        ) from error


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Converts ``image`` to RGB: grey to all three channels, transparent parts over white.

    Raises ValueError for more than 8 bits a channel, which Pillow would cut off.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits; convert it to 8-bit grey first")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Applies ``function`` to every item, in order, in as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
