"""``save_images``: samples as one PNG each, named by their number."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..diffusion.image_batches import check_images, to_uint8
from ..errors import CheckpointError, DataError
from ..fileio import replace_atomically


def image_path(folder: str | Path, number: int) -> Path:
    """Where image ``number`` lies: 000007.png for 7."""
    return Path(folder) / f"{number:06d}.png"


def saved(folder: str | Path, numbers: Iterable[int]) -> bool:
    """Whether every one of these images is in ``folder``: what ``sample_batches`` may skip."""
    return all(image_path(folder, number).exists() for number in numbers)


def save_images(
    folder: str | Path, numbers: Iterable[int], images: Tensor, *, resume: bool = False
) -> int:
    """Write ``images`` [B, 1 or 3, h, w] in [-1, 1] as 000000.png ... and return how many it wrote.

    A file appears whole or not at all. ``resume``: leave those that are there. Raises DataError
    for images that are none, CheckpointError where the disk does not take them.
    """
    folder, numbers = Path(folder), list(numbers)
    if check_images(images, numbers).shape[1] not in (1, 3):
        raise DataError(
            f"images {list(images.shape)} have no 1 or 3 channels: latents must be decoded first"
        )
    todo = [
        row
        for row, number in enumerate(numbers)
        if not (resume and image_path(folder, number).exists())
    ]
    for row in todo:
        write(image_path(folder, numbers[row]), images[row])
    return len(todo)


def write(path: Path, image: Tensor) -> None:
    """Write ``image`` [1 or 3, h, w] at ``path``, through a file beside it."""
    rows = to_uint8(image).permute(1, 2, 0).squeeze(2).contiguous().numpy()
    try:
        with replace_atomically(path) as part:
            Image.fromarray(rows).save(part, format="PNG")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another folder, "
            "then run again with resume: the images already there are kept"
        ) from error
