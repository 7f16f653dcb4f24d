"""Rows of images as one labelled PNG; pixels are enlarged without interpolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..diffusion.image_batches import to_uint8
from ..errors import DataError
from ..optional_deps import require_extra

if TYPE_CHECKING:
    from PIL import Image

GAP = 4
FONT_SIZE = 15


def save_grid(
    path: str | Path,
    rows: Mapping[str, Tensor],
    *,
    columns: Sequence[str] = (),
    scale: int = 8,
) -> None:
    """Writes rows of images as one PNG, a label beside each row.

    Args:
        path: The PNG to write; its folder is made.
        rows: Label -> images [n, 1 or 3, h, w] in [-1, 1], all of one shape.
        columns: The labels [n] of the columns; none by default.
        scale: The side of the square that a pixel becomes.

    Raises:
        ConfigError: Pillow is not installed.
        DataError: The rows have different shapes or no 1 or 3 channels, or there are not as many
            labels as columns.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_grid(f"{folder}/grid.png", {"noise": torch.randn(5, 1, 8, 8)})
    """
    shapes = {tuple(images.shape) for images in rows.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 4 or shape[1] not in (1, 3):
        raise DataError("a grid needs rows of equally many images [n, 1 or 3, h, w]")
    if columns and len(columns) != shape[0]:
        raise DataError(f"{len(columns)} column labels for {shape[0]} images in a row")
    with require_extra("a sample grid", "train"):
        from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(FONT_SIZE)
    left = int(max(font.getlength(label) for label in rows)) + 3 * GAP
    top = FONT_SIZE + 2 * GAP if columns else GAP
    height, width = shape[2] * scale + GAP, shape[3] * scale + GAP
    canvas = Image.new("RGB", (left + shape[0] * width, top + len(rows) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(columns):
        middle = left + column * width + shape[3] * scale // 2
        draw.text((middle, top // 2), label, "black", font, anchor="mm")
    for row, (label, images) in enumerate(rows.items()):
        y = top + row * height
        draw.text((left - 2 * GAP, y + shape[2] * scale // 2), label, "black", font, anchor="rm")
        for column, image in enumerate(images):
            canvas.paste(enlarge(image, scale), (left + column * width, y))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def enlarge(image: Tensor, scale: int) -> Image.Image:
    """Returns ``image`` [1 or 3, h, w] in [-1, 1], ``scale`` times as wide and as high."""
    from PIL import Image

    values = to_uint8(image)
    height, width = values.shape[1:]
    small = Image.fromarray(values.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    return small.resize((width * scale, height * scale), Image.Resampling.NEAREST)
