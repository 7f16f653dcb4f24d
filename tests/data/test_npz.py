"""npz archives of arrays, and packs of JPEGs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsedm_compiler.data import open_data
from sparsedm_compiler.errors import DataError
from tests.data.cases import expected, jpeg_pack, ops_of, pixels, smooth

COLOUR = pixels(6, 4, 5, 3)
GREY = pixels(6, 4, 5, 1)
LABELS = np.array([1, 0, 2, 1, 0, 2], np.uint8)


def written(path: Path, **arrays: Any) -> str:
    np.savez_compressed(path / "x.npz", **arrays)
    return str(path / "x.npz")


@pytest.mark.parametrize(("image", "label"), [("x", "y"), ("images", "labels"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("layout", ["last", "first", "grey", "grey last"])
def test_npz_arrays_of_every_layout(image: str, label: str, layout: str, tmp_path: Path) -> None:
    arrays = {
        "last": COLOUR,
        "first": COLOUR.transpose(0, 3, 1, 2),
        "grey": GREY[..., 0],
        "grey last": GREY,
    }
    data = open_data(written(tmp_path, **{image: arrays[layout], label: LABELS}))
    truth = expected(GREY if "grey" in layout else COLOUR)
    found, labels = data.fetch([5, 0, 3])
    torch.testing.assert_close(found, truth[[5, 0, 3]], rtol=0, atol=1e-6)
    assert isinstance(labels, Tensor)
    assert (labels.tolist(), labels.dtype) == ([2, 1, 1], torch.int64)
    assert (len(data), data.shape, data.classes) == (6, tuple(truth.shape[1:]), 3)
    assert ops_of(data, range(6)) == ops_of(data, range(1))


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_npz_floats_in_range_are_kept(kind: type[np.floating[Any]], tmp_path: Path) -> None:
    images = (COLOUR / 127.5 - 1).astype(kind)
    data = open_data(written(tmp_path, x=images))
    assert torch.equal(data.fetch([1])[0], torch.tensor(images[1:2].transpose(0, 3, 1, 2)).float())
    assert (data.classes, data.fetch([1])[1]) == (None, None)


def test_npz_splits(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        train_images=COLOUR[:4],
        train_labels=LABELS[:4],
        train_index=np.arange(4),
        test_x=COLOUR[4:],
        test_y=LABELS[4:],
    )
    for spec, rows in (
        (path, slice(4)),
        (f"{path}:train", slice(4)),
        (f"{path}:test", slice(4, 6)),
    ):
        found, labels = open_data(spec).fetch(range(2))
        torch.testing.assert_close(found, expected(COLOUR[rows][:2]), rtol=0, atol=1e-6)
        assert isinstance(labels, Tensor)
        assert labels.tolist() == LABELS[rows][:2].tolist()
    with pytest.raises(DataError, match=r"train_index, .* no images of a split 'val'"):
        open_data(f"{path}:val")


def test_npz_with_labels_limit_and_size(tmp_path: Path) -> None:
    path = written(tmp_path, x=COLOUR, y=LABELS)
    data = open_data(path, labels=False, limit=99)
    assert (len(data), data.classes, data.fetch([0])[1]) == (6, None, None)
    data = open_data(path, limit=2, size=2)
    assert (len(data), data.shape, data.classes) == (2, (3, 2, 2), 3)
    box = COLOUR[:2, :, :4].reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
    found = (data.fetch([0, 1])[0].permute(0, 2, 3, 1) + 1) * 127.5
    np.testing.assert_allclose(found, box, rtol=0, atol=1.01)
    with pytest.raises(IndexError):
        data.fetch([2])


WRONG = [
    ({"x": COLOUR, "y": LABELS[:5]}, r"labels \[5\] for 6 images"),
    ({"x": COLOUR, "y": LABELS / 2}, "labels of type float64"),
    ({"x": COLOUR, "y": np.array([*"abcdef"])}, "labels of type <U1"),
    ({"x": COLOUR, "y": LABELS.astype(int) - 1}, "label -1 is below 0"),
    ({"x": COLOUR.astype(np.int64)}, "int64 are neither uint8"),
    ({"x": COLOUR / 255.0}, "floats from 0.* to 1 are not"),
    ({"x": COLOUR.astype(float)}, "floats from 0 to 255 are not"),
    ({"x": COLOUR / 127.5 - 2}, "floats from -2 to .* are not"),
    ({"x": np.full((1, 2, 2, 3), np.nan)}, "nan"),
    ({"x": pixels(2, 4, 4, 4)}, r"\[2, 4, 4, 4\] are not"),
    ({"x": pixels(2, 4)}, r"\[2, 4\] are not"),
    ({"x": COLOUR[:0]}, "holds no images"),
    ({"x": COLOUR[:0] / 255.0}, "holds no images"),
    ({"z": COLOUR}, "holds z, no images"),
    ({}, "holds nothing, no images"),
    ({"x": np.array([COLOUR, None], dtype=object)}, "its array 'x' holds Python objects"),
    ({"x": COLOUR, "y": np.array([*range(5), None])}, "its array 'y' holds Python objects"),
]


@pytest.mark.parametrize(("arrays", "message"), WRONG, ids=[message for _, message in WRONG])
def test_npz_arrays_that_are_no_images_raise(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_data(written(tmp_path, **arrays))
    assert str(caught.value).startswith("cannot read") == ("Python objects" in message)
    assert "pickle=" not in str(caught.value)


def test_npz_file_that_is_no_archive_raises(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(DataError, match=r"cannot read .*x\.npz"):
        open_data(str(path))
    with path.open("wb") as file:
        np.save(file, COLOUR)
    with pytest.raises(DataError, match="not an archive"):
        open_data(path)
    whole = Path(written(tmp_path, x=COLOUR)).read_bytes()
    places = range(len(whole) // 8, len(whole) // 2, 5)
    damaged = [whole[:place] + b"\xff\xff" + whole[place + 2 :] for place in places]
    for data in (b"", b"no archive", b"PK garbage", b"PK\3\4 torn", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"cannot read .*x\.npz: it is no whole \.npz file$"):
            open_data(path)
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot read") as caught:
            open_data(path)
        assert "pickle" not in str(caught.value)


def header_of(*shape: int) -> bytes:
    """The first bytes of an array of a shape."""
    header = io.BytesIO()
    entry = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, entry)
    return header.getvalue()


def test_npz_entries_that_are_no_arrays_raise(tmp_path: Path) -> None:
    path, header = tmp_path / "x.npz", io.BytesIO()
    np.save(header, COLOUR)
    long = header.getvalue().replace(b"\x76\x00{", b"\xff\xff{") + bytes(70_000)
    for entry, says in (
        (b"no array", "its entry 'x' is no array"),
        (header.getvalue()[:60], "its array 'x' is damaged"),
        (header_of(10**15, 4), "its array 'x' does not fit into memory, if it is not damaged"),
        (header_of(10**30), "its array 'x' is damaged"),
        (long, "its array 'x' is damaged$"),  # numpy's own words name allow_pickle
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", entry)
        with pytest.raises(DataError, match=says):
            open_data(path)


@pytest.fixture(scope="module")
def pack() -> tuple[dict[str, np.ndarray], np.ndarray]:
    return jpeg_pack(smooth(6, 16), LABELS)


def test_jpeg_pack_decodes_like_its_files(pack: Any, tmp_path: Path) -> None:
    arrays, truth = pack
    data = open_data(written(tmp_path, **arrays))
    assert (len(data), data.shape, data.classes) == (6, (3, 16, 16), 3)
    for numbers in ([4], [5, 4, 0, 5], range(6), []):
        found, labels = data.fetch(numbers)
        rows = list(numbers)
        torch.testing.assert_close(found, expected(truth)[rows], rtol=0, atol=1e-6)
        assert isinstance(labels, Tensor)
        assert labels.tolist() == LABELS[rows].tolist()


def test_jpeg_pack_is_decoded_once(pack: Any, tmp_path: Path) -> None:
    arrays, _ = pack
    data: Any = open_data(written(tmp_path, **arrays))
    first = data.fetch(range(6))[0]
    data.body = b""
    assert torch.equal(data.fetch(range(6))[0], first)
    assert ops_of(data, range(6)) == ops_of(data, range(1))


def test_hash_of_a_jpeg_pack_follows_every_byte_that_is_read(pack: Any, tmp_path: Path) -> None:
    arrays, _ = pack
    first, some = (open_data(written(tmp_path, **arrays), limit=n).hash_content() for n in (6, 5))
    assert first == open_data(written(tmp_path, **arrays)).hash_content() != some
    body = arrays["body"].copy()
    body[-1] ^= 1
    changed = written(tmp_path, **{**arrays, "body": body})
    assert open_data(changed).hash_content() != first
    assert open_data(changed, limit=5).hash_content() == some


def test_jpeg_pack_with_labels_limit_and_size(pack: Any, tmp_path: Path) -> None:
    arrays, truth = pack
    path = written(tmp_path, **arrays)
    data = open_data(path, labels=False, size=8, limit=5)
    found, labels = data.fetch(range(5))
    assert (data.classes, labels, len(data)) == (None, None, 5)
    box = truth[:5].reshape(5, 8, 2, 8, 2, 3).mean((2, 4))
    np.testing.assert_allclose((found.permute(0, 2, 3, 1) + 1) * 127.5, box, rtol=0, atol=1.01)
    bare = {name: array for name, array in arrays.items() if name != "labels"}
    assert open_data(written(tmp_path, **bare)).classes is None


DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"body": lambda a: a["body"][:-7]}, "the offsets end at byte .* cut off or damaged"),
    ({"offsets": lambda a: a["offsets"][:-1]}, "the offsets end at byte"),
    ({"offsets": lambda a: a["offsets"][::-1]}, "do not rise"),
    ({"offsets": lambda a: a["offsets"].astype(float)}, "float64 are not integers"),
    ({"offsets": lambda a: a["offsets"][:1]}, r"offsets \[1\]"),
    ({"header": lambda a: a["header"][None]}, r"header \[1, "),
    ({"body": lambda a: a["body"].astype(np.int16)}, "int16 is not uint8"),
    ({"labels": lambda a: a["labels"][:3]}, r"labels \[3\] for 6"),
    ({"header": lambda a: a["header"][:40]}, "JPEG 0 of .* cannot be read"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_damaged_jpeg_pack_raises(
    change: dict[str, Any], message: str, pack: Any, tmp_path: Path
) -> None:
    arrays = {**pack[0], **{name: damage(pack[0]) for name, damage in change.items()}}
    with pytest.raises(DataError, match=message):
        open_data(written(tmp_path, **arrays))


def test_jpeg_cut_off_inside_a_pack_is_named(pack: Any, tmp_path: Path) -> None:
    arrays, _ = pack
    starts = arrays["offsets"].astype(int)
    cut = starts[3] - (starts[3] - starts[2]) // 2  # half of picture 2 is lost
    shorter = {
        **arrays,
        "body": np.delete(arrays["body"], np.s_[cut : starts[3]]),
        "offsets": np.where(starts > cut, starts - (starts[3] - cut), starts),
    }
    data = open_data(written(tmp_path, **shorter))
    assert len(data.fetch([0, 1, 3])[0]) == 3
    with pytest.raises(DataError, match=r"JPEG 2 of .* cannot be read"):
        data.fetch(range(6))
    with pytest.raises(DataError, match="no splits such as 'test'"):
        open_data(f"{tmp_path / 'x.npz'}:test")
