"""safetensors row by row, against the safetensors package."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsedm_compiler.data.rowfile import TYPE_NAMES, RowFile, read_header
from sparsedm_compiler.errors import DataError


def tensors() -> dict[str, torch.Tensor]:
    """7 rows of every type, of shapes that end at odd bytes."""
    found = {}
    for dtype, name in TYPE_NAMES.items():
        values = torch.randn(7, 3, 5) * 50
        found[name] = (values > 0) if dtype is torch.bool else values.to(dtype)
    return {**found, "labels": torch.arange(7)}


def write(path: Path, *blocks: dict[str, torch.Tensor]) -> None:
    """Four rows."""
    with RowFile(path, 4, {}) as file:
        for block in blocks:
            file.write(block)


@pytest.mark.filterwarnings("error")
def test_blocks_of_rows_become_a_file_that_safetensors_reads(tmp_path: Path) -> None:
    given, path = tensors(), tmp_path / "new" / "a.safetensors"
    with RowFile(path, 7, {"who": "we"}) as file:
        for first, last in ((0, 3), (3, 4), (4, 7)):
            file.write({name: tensor[first:last] for name, tensor in given.items()})
    torch.testing.assert_close(load_file(path), given, rtol=0, atol=0)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "who": "we"}
    assert [*path.parent.iterdir()] == [path]
    for name, rows in read_header(path)[0].items():
        assert rows.start % given[name].itemsize == 0, "not aligned"


def test_transposed_rows_and_rows_with_gradients(tmp_path: Path) -> None:
    given = torch.randn(3, 4, 2, requires_grad=True).transpose(1, 2)
    with RowFile(tmp_path / "a.safetensors", 3, {}) as file:
        file.write({"a": given})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], given)


def test_rows_are_read_as_safetensors_wrote_them(tmp_path: Path) -> None:
    given, path = tensors(), tmp_path / "a.safetensors"
    save_file(given, path, {"who": "we"})
    found, notes = read_header(path)
    assert notes["who"] == "we"
    assert found.keys() == given.keys()
    for index in ([6, 0, 6], [3], []):
        rows = torch.tensor(index, dtype=torch.int64)
        for name, tensor in given.items():
            assert found[name].shape == tuple(tensor.shape)
            torch.testing.assert_close(found[name].read_rows(rows), tensor[rows], rtol=0, atol=0)


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    """A file far larger than any memory: 2**40 bytes, all but the last row a hole."""
    path, count = tmp_path / "a.safetensors", 2**36
    header = b'{"a":{"dtype":"F32","shape":[%d,4],"data_offsets":[0,%d]}}' % (count, count * 16)
    header += b" " * (-len(header) % 8)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + count * 16)
            file.seek(-16, 2)
            file.write(struct.pack("<4f", 1, 2, 3, 4))
    except OSError as error:
        pytest.skip(f"no files with holes of this size here: {error}")
    rows = read_header(path)[0]["a"].read_rows(torch.tensor([count - 1, 5]))
    path.unlink()
    assert rows.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_file_leaves_what_was_there(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("before")

    def interrupted() -> None:
        with RowFile(path, 4, {}) as file:
            file.write({"a": torch.zeros(2, 3)})
            assert len([*tmp_path.iterdir()]) == 2
            raise error

    with pytest.raises(error):
        interrupted()
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "before"


def test_a_file_with_too_few_rows_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 4 rows"):
        write(tmp_path / "a.safetensors", {"a": torch.zeros(2, 3)})
    assert not [*tmp_path.iterdir()]


def test_blocks_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    first = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    wrong = [
        {"a": torch.zeros(2, 3)},
        {**first, "a": torch.zeros(2, 4)},
        {**first, "a": torch.zeros(2, 3, dtype=torch.float16)},
        {**first, "a": torch.zeros(1, 3)},
    ]
    for second in wrong:
        with pytest.raises(DataError, match="do not go on"):
            write(tmp_path / "a.safetensors", first, second)
    with pytest.raises(DataError, match="complex64 cannot be written"):
        write(tmp_path / "a.safetensors", {"a": torch.zeros(4, dtype=torch.complex64)})
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write(tmp_path / "file" / "a.safetensors", first, first)
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_files_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(DataError, match="cannot read"):
        read_header(path)
    save_file({"a": torch.arange(100)}, path)
    whole = path.read_bytes()
    found = read_header(path)[0]["a"]
    for length in (0, 5, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cannot read"):
            read_header(path)
    with pytest.raises(DataError, match="cannot read"):
        found.read_rows(torch.tensor([0]))
