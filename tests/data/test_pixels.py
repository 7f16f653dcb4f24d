"""Cutting, resizing and decoding against numpy."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsedm_compiler.data.pixels import decode_image, map_in_threads, resize_pixels
from sparsedm_compiler.errors import DataError
from tests.data.cases import pixels, save


def lanczos(side: int, size: int) -> np.ndarray:
    """The matrix [size, side] of Lanczos resampling with three lobes, widened when it shrinks."""
    scale = side / size
    wide = max(scale, 1.0)
    middles = (np.arange(size) + 0.5)[:, None] * scale
    x = (np.arange(side) + 0.5 - middles) / wide
    weights = np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True)


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def test_resizing_by_a_whole_multiple_averages_boxes() -> None:
    images = pixels(3, 12, 12, 3)
    expected = images.reshape(3, 4, 3, 4, 3, 3).mean((2, 4))
    found = resize_pixels(channels_first(images), 4)
    assert found.dtype == torch.uint8
    np.testing.assert_allclose(
        found.permute(0, 2, 3, 1), expected, rtol=0, atol=1.01
    )  # rounded twice


@pytest.mark.parametrize(("side", "size"), [(12, 5), (6, 9), (4, 8)])
def test_resizing_to_any_other_size_is_lanczos(side: int, size: int) -> None:
    images = pixels(2, side, side, 1) / np.float32(255) - np.float32(0.5)
    matrix = lanczos(side, size)
    expected = np.einsum("ih,nhw,jw->nij", matrix, images[..., 0], matrix)
    found = resize_pixels(channels_first(images), size)
    np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=1e-5)
    bytes_ = pixels(2, side, side, 1)
    across = (bytes_[..., 0] @ matrix.T).round().clip(0, 255)
    down = (matrix @ across).round().clip(0, 255)
    np.testing.assert_allclose(
        resize_pixels(channels_first(bytes_), size)[:, 0], down, rtol=0, atol=1
    )


def test_resized_floats_stay_in_range() -> None:
    edge = torch.ones(1, 1, 8, 8)
    edge[..., :4] = -1
    found = resize_pixels(edge, 6)
    assert (found.min(), found.max()) == (-1, 1)
    assert found.unique().numel() > 2


@pytest.mark.parametrize(("height", "width"), [(9, 4), (4, 9), (5, 4)])
def test_resizing_crops_the_middle_square(height: int, width: int) -> None:
    images = pixels(2, height, width, 3)
    top, left = (height - 4) // 2, (width - 4) // 2
    expected = channels_first(images[:, top : top + 4, left : left + 4])
    assert torch.equal(resize_pixels(channels_first(images), 4), expected)


def test_resizing_to_no_size_or_the_same_size_changes_nothing() -> None:
    images = channels_first(pixels(2, 4, 4, 1))
    assert resize_pixels(images, None) is images
    assert resize_pixels(images, 4) is images


def test_files_and_tensors_are_resized_alike(tmp_path: Path) -> None:
    image = pixels(9, 13, 3)
    save(tmp_path / "a.png", image)
    for size in (3, 5, 20):
        found = decode_image("a", tmp_path / "a.png", size)
        np.testing.assert_array_equal(
            found.transpose(2, 0, 1), resize_pixels(channels_first(image[None]), size)[0]
        )


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_decode_image_of_every_mode_is_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(pixels(4, 4, 3)).convert(mode)
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(file)
    with Image.open(file) as again:
        truth = np.array(again.convert("RGB"))
    np.testing.assert_array_equal(decode_image("a", file, None), truth)


def test_decode_image_puts_transparent_parts_on_white() -> None:
    image = np.zeros((2, 2, 4), np.uint8)
    image[0, 0], image[0, 1], image[1, 0] = (9, 8, 7, 255), (9, 8, 7, 0), (0, 0, 0, 51)
    found = decode_image("a", png(Image.fromarray(image)), None)
    assert found[0].tolist() == [[9, 8, 7], [255] * 3]
    assert found[1, 0].tolist() == [204] * 3
    palette = Image.fromarray(np.zeros((2, 2), np.uint8)).convert("P")
    assert decode_image("a", png(palette, transparency=0), None).min() == 255


def png(image: Image.Image, **options: object) -> BytesIO:
    file = BytesIO()
    image.save(file, "png", **options)
    return BytesIO(file.getvalue())


def test_decode_image_applies_exif_orientation(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(4, 6, 3))
    turned = Image.Exif()
    turned[0x112] = 6  # the camera was turned: rows of the file are columns from the right
    image.save(tmp_path / "a.png", exif=turned)
    found = decode_image("a", tmp_path / "a.png", None)
    np.testing.assert_array_equal(found, np.rot90(np.array(image), -1))


def test_decode_image_of_a_broken_file_names_it(tmp_path: Path) -> None:
    save(tmp_path / "whole.png", pixels(20, 20, 3))
    save(tmp_path / "whole.jpg", pixels(20, 20, 3))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    for name in ("whole.png", "whole.jpg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"half-{name}").write_bytes(data[: len(data) // 2])
    for name in ("text.png", "empty.jpg", "half-whole.png", "half-whole.jpg", "missing.png"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            decode_image(name, tmp_path / name, None)


def test_decode_image_of_more_than_eight_bits_raises(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 4000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="8 bits"):
        decode_image("a", tmp_path / "a.png", None)


@pytest.mark.parametrize("threads", [1, 3])
def test_map_in_threads_keeps_order_and_raises_errors(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert map_in_threads(lambda x: x * x, range(20)) == [x * x for x in range(20)]
    assert map_in_threads(str, []) == []
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda x: 1 // x, [1, 0, 2])
