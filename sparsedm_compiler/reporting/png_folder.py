"""Folders of samples, one numbered PNG per image."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ..diffusion.image_batches import check_images, to_uint8
from ..errors import CheckpointError, DataError
from ..fileio import replace_atomically
from ..optional_deps import require_extra


def image_path(folder: str | Path, number: int) -> Path:
    """Returns the path of an image in ``folder``: 000007.png for number 7."""
    return Path(folder) / f"{number:06d}.png"


def has_images(folder: str | Path, numbers: Iterable[int]) -> bool:
    """Returns whether a folder of ``save_images`` holds all of these images.

    Args:
        folder: The folder.
        numbers: The image numbers to look for.

    Returns:
        True if none is missing, so that ``sample_batches`` may skip them.
    """
    return all(image_path(folder, number).exists() for number in numbers)


def save_images(
    folder: str | Path, numbers: Iterable[int], images: Tensor, *, resume: bool = False
) -> int:
    """Writes images as 000000.png, 000001.png ... into a folder; no file is ever half-written.

    Args:
        folder: The folder; it is made.
        numbers: The number of every image, which its file is named by.
        images: Images [B, 1 or 3, h, w] in [-1, 1]; values beyond are clamped.
        resume: Keep files that exist instead of replacing them.

    Returns:
        The number of files written.

    Raises:
        ConfigError: Pillow is not installed.
        DataError: The images have no 1 or 3 channels, are not finite, or are not as many as the
            numbers.
        CheckpointError: A file cannot be written, e.g. because the disk is full.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_images(folder, range(2), torch.zeros(2, 3, 8, 8))
        ...     has_images(folder, range(3))
        2
        False
    """
    folder, numbers = Path(folder), list(numbers)
    if check_images(images, numbers).shape[1] not in (1, 3):
        raise DataError(
            f"images {list(images.shape)} have no 1 or 3 channels: latents must be decoded first"
        )
    missing = [
        row
        for row, number in enumerate(numbers)
        if not (resume and image_path(folder, number).exists())
    ]
    for row in missing:
        write_png(image_path(folder, numbers[row]), images[row])
    return len(missing)


def write_png(path: Path, image: Tensor) -> None:
    """Writes ``image`` [1 or 3, h, w] at ``path``, atomically. Raises CheckpointError."""
    with require_extra("a PNG", "train"):
        from PIL import Image
    array = to_uint8(image).permute(1, 2, 0).squeeze(2).contiguous().numpy()
    try:
        with replace_atomically(path) as part:
            Image.fromarray(array).save(part, format="PNG")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another folder, "
            "then run again with resume: the images already there are kept"
        ) from error
