"""``save_grid``: enlarged pixels, labelled rows, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsedm_compiler.errors import DataError
from sparsedm_compiler.reporting import save_grid
from sparsedm_compiler.reporting.grid import GAP


def test_save_grid_enlarges_pixels_and_keeps_their_values(tmp_path: Path) -> None:
    ramp = torch.linspace(-1, 1, 12).reshape(3, 1, 2, 2)
    path = tmp_path / "new" / "grid.png"
    save_grid(path, {"up": ramp, "a longer label": -ramp}, columns=["a", "b", "c"], scale=6)
    picture = np.asarray(Image.open(path).convert("L"))
    height, width = picture.shape
    for row, images in enumerate((ramp, -ramp)):
        for column, image in enumerate(images):
            top, left = height - (2 - row) * (12 + GAP), width - (3 - column) * (12 + GAP)
            expected = ((image[0] + 1) * 127.5).round().byte().numpy()
            square = picture[top : top + 12, left : left + 12]
            np.testing.assert_array_equal(square, np.kron(expected, np.ones((6, 6), np.uint8)))
    labels = picture[height - 2 * (12 + GAP) :, : width - 3 * (12 + GAP)]
    assert (labels < 128).any()


def test_save_grid_clamps_colours(tmp_path: Path) -> None:
    red = torch.tensor([5.0, -7.0, -1.0]).reshape(1, 3, 1, 1)
    save_grid(tmp_path / "grid.png", {"x": red}, scale=8)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.getpixel((picture.width - GAP - 4, picture.height - GAP - 4)) == (255, 0, 0)


def test_save_grid_of_unequal_rows_raises_data_error(tmp_path: Path) -> None:
    for rows in ({}, {"a": torch.zeros(2, 1, 4, 4), "b": torch.zeros(3, 1, 4, 4)}):
        with pytest.raises(DataError, match="equally many"):
            save_grid(tmp_path / "grid.png", rows)
    with pytest.raises(DataError, match="2 column labels for 3"):
        save_grid(tmp_path / "grid.png", {"a": torch.zeros(3, 1, 4, 4)}, columns=["x", "y"])
