"""Hashes that tell whether two readings of a source of images are of the same content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.condition import list_tensors
from ..diffusion.image_batches import Batch
from ..errors import DataError
from .pixels import map_in_threads

HASHED_BYTES = 2**30
"""Images in a file are hashed whole up to so many bytes; it takes a second or two."""
CHUNK_BYTES = 2**26
"""A tensor is hashed so many bytes at a time."""
SAMPLES = 64
"""The images of a source whose content is hashed, spread evenly over all."""


def spread_numbers(count: int) -> list[int]:
    """Returns the numbers of at most ``SAMPLES`` images, the first and the last among them.

    >>> spread_numbers(3)
    [0, 1, 2]
    """
    samples = min(count, SAMPLES)
    return [number * (count - 1) // max(samples - 1, 1) for number in range(samples)]


def hash_tensor(tensor: Tensor) -> bytes:
    """Returns the SHA-256 of a tensor's type, shape and values."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def hash_images(fetch: Callable[[Sequence[int]], Batch], count: int, kind: str) -> str:
    """Returns a hash of the images and conditions that ``fetch`` returns by number.

    ``kind``: anything else that tells sources apart, as text.
    """
    digest = hashlib.sha256(f"{count} {kind}".encode())
    images, condition = fetch(spread_numbers(count))
    digest.update(hash_tensor(images))
    if condition is not None:
        for name, tensor in list_tensors(condition).items():
            digest.update(name.encode() + hash_tensor(tensor))
    return digest.hexdigest()


def hash_all(tensors: Iterable[Tensor]) -> str:
    """Returns a hash of all values of tensors [n, ...], which is taken chunk by chunk."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        rows = max(1, CHUNK_BYTES // max(1, tensor[:1].numel() * tensor.element_size()))
        for part in map_in_threads(hash_tensor, torch.split(tensor, rows)):
            digest.update(part)
    return digest.hexdigest()


def hash_encoded(name: str, file: Path | BytesIO) -> bytes:
    """Returns the SHA-256 of an encoded image: its pixels may differ by a bit between machines.

    ``name`` names the image in errors. Raises DataError where the file cannot be read.
    """
    try:
        content = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error
    return hashlib.sha256(content).digest()
