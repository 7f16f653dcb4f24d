"""A folder of images: what is found, in which order, of which class."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparsedm_compiler.data import ReadOptions, open_data
from sparsedm_compiler.data.folder import open_folder
from sparsedm_compiler.errors import DataError
from tests.data.cases import expected, pixels, save

FILES = ["b/z.png", "b/deep/er/a.BMP", "a/2.webp", "a/10.png", "c/x.png"]


def filled(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Files of those names, without loss, and their pixels."""
    found = {name: pixels(4, 5, 3, seed=number) for number, name in enumerate(names)}
    for name, image in found.items():
        save(root / name, image, **({"lossless": True} if name.endswith("webp") else {}))
    return found


def test_folder_images_are_in_path_order_with_their_folder_as_class(
    tmp_path: Path,
) -> None:
    images = filled(tmp_path, FILES)
    for junk in ("a/notes.txt", ".hidden/a.png", "a/._2.png"):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).write_text("junk")
    data = open_data(tmp_path)
    order = ["a/10.png", "a/2.webp", "b/deep/er/a.BMP", "b/z.png", "c/x.png"]
    found, labels = data.fetch(range(5))
    truth = expected(np.stack([images[name] for name in order]))
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6)
    assert isinstance(labels, Tensor)
    assert labels.tolist() == [0, 0, 1, 1, 2]
    assert (len(data), data.shape, data.classes) == (5, (3, 4, 5), 3)
    again, labels = data.fetch([4, 2, 4])
    torch.testing.assert_close(again, found[[4, 2, 4]])
    assert isinstance(labels, Tensor)
    assert labels.tolist() == [2, 1, 2]
    assert data.fetch([])[0].shape == (0, 3, 4, 5)


def test_folder_with_an_image_outside_of_the_classes_raises(tmp_path: Path) -> None:
    filled(tmp_path, ["a/1.png", "b/1.png", "1.png"])
    with pytest.raises(DataError, match=r"2 images in sub-folders, .* 1 beside them \(1\.png .*\)"):
        open_data(str(tmp_path))
    data = open_data(str(tmp_path), labels=False)
    assert (len(data), data.classes, data.fetch([0])[1]) == (3, None, None)
    (tmp_path / "1.png").unlink()
    assert open_data(tmp_path).classes == 2


def test_folder_takes_all_that_pillow_decodes_and_notes_the_rest(tmp_path: Path) -> None:
    image = pixels(4, 4, 3)
    for name in ("a.tiff", "b.TIF", "c.gif", "d.ppm", "e.jfif", "f.png"):
        save(tmp_path / name, image)
    frames = [Image.fromarray(pixels(4, 4, 3, seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "g.gif", save_all=True, append_images=frames[1:])
    for name in ("notes.txt", "a/labels.csv", "b/labels.csv", "README", "film.mpeg", "page.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("junk")
    data = open_data(tmp_path)
    assert len(data) == 7
    found = data.fetch(range(7))[0]
    for number in (0, 1, 3, 5):  # without loss
        torch.testing.assert_close(found[number], expected(image[None])[0], rtol=0, atol=1e-6)
    (note,) = data.notes
    assert note.startswith("left out 6 files of kinds that Pillow does not open (2 .csv, ")
    for kind in ("1 .txt", "1 no suffix", "1 .mpeg", "1 .pdf"):
        assert kind in note
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.txt").write_text("junk")
    with pytest.raises(DataError, match=r"holds no images, only 1 file .* \(1 \.txt\)"):
        open_data(tmp_path / "only")


def test_check_images_names_every_image_that_cannot_be_read(tmp_path: Path) -> None:
    filled(tmp_path, [f"{number}.png" for number in range(9)])
    data = open_data(tmp_path)
    data.check_images()
    for name in ("3.png", "7.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    (tmp_path / "5.png").unlink()
    save(tmp_path / "8.png", pixels(4, 6, 3))
    with pytest.raises(DataError, match="4 images cannot be used: ") as refusal:
        data.check_images()
    for name in ("3.png cannot", "5.png cannot", "7.png cannot", "8.png is 6 x 4 pixels"):
        assert str(tmp_path / name) in str(refusal.value)


def test_fingerprint_follows_the_files_and_not_their_place(tmp_path: Path) -> None:
    filled(tmp_path / "one", FILES)
    first = open_data(tmp_path / "one").fingerprint()
    assert open_data(tmp_path / "one").fingerprint() == first
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert open_data(tmp_path / "two").fingerprint() == first
    assert open_data(tmp_path / "two", labels=False).fingerprint() != first
    assert open_data(tmp_path / "two", size=4).fingerprint() != first
    assert open_data(tmp_path / "two", limit=4).fingerprint() != first
    (tmp_path / "two/c/x.png").rename(tmp_path / "two/c/y.png")
    assert open_data(tmp_path / "two").fingerprint() != first
    save(tmp_path / "one/c/x.png", pixels(4, 5, 3, seed=9))
    assert open_data(tmp_path / "one").fingerprint() != first


def test_folder_with_labels_limit_and_size(tmp_path: Path) -> None:
    images = filled(tmp_path, FILES)
    data = open_data(tmp_path, labels=False, limit=99)
    assert (len(data), data.classes, data.fetch([1])[1]) == (5, None, None)
    data = open_data(tmp_path, limit=2, size=2)
    assert (len(data), data.shape, data.classes) == (2, (3, 2, 2), 3)
    box = images["a/10.png"][:, :4].reshape(2, 2, 2, 2, 3).mean((1, 3))
    found = (data.fetch([0])[0][0].permute(1, 2, 0) + 1) * 127.5
    np.testing.assert_allclose(found, box, rtol=0, atol=1.01)
    with pytest.raises(IndexError):
        data.fetch([2])


def test_folder_of_grey_transparent_and_coloured_files_is_rgb(tmp_path: Path) -> None:
    image = pixels(4, 4, 3)
    save(tmp_path / "a.png", image)
    save(tmp_path / "b.png", image, "L")
    save(tmp_path / "c.png", image, "RGBA")
    colour, grey, alpha = open_data(tmp_path).fetch(range(3))[0]
    assert torch.equal(colour, alpha)
    assert torch.equal(grey[0], grey[2])
    assert not torch.equal(grey, colour)


def test_fetch_of_a_broken_file_names_it(tmp_path: Path) -> None:
    filled(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    data = open_data(tmp_path)
    with pytest.raises(DataError, match=r"2\.png cannot be read"):
        data.fetch([0, 1])
    assert len(data.fetch([0, 2])[0]) == 2
    (tmp_path / "1.png").write_text("broken")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        open_data(tmp_path)


def test_folder_of_several_sizes_without_a_size_raises(tmp_path: Path) -> None:
    save(tmp_path / "1.png", pixels(4, 5, 3))
    save(tmp_path / "2.png", pixels(4, 6, 3))
    with pytest.raises(DataError, match=r"2\.png is 6 x 4 pixels, .*1\.png 5 x 4: give a size"):
        open_data(tmp_path).fetch([0, 1])
    assert open_data(tmp_path, size=4).fetch([0, 1])[0].shape == (2, 3, 4, 4)


def test_folder_without_images_or_of_splits_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images and no other files; a dataset"):
        open_data(tmp_path)
    filled(tmp_path, ["train/a/1.png", "Test/a/1.png"])
    with pytest.raises(DataError, match="holds the splits Test, train; open one"):
        open_data(tmp_path)
    assert open_data(tmp_path / "train").classes == 1


def test_open_folder_that_cannot_be_listed_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot list .*none"):
        open_folder(tmp_path / "none", ReadOptions())


def test_folder_links_are_followed(tmp_path: Path) -> None:
    filled(tmp_path / "elsewhere", ["1.png"])
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(open_data(tmp_path / "root")) == 1
