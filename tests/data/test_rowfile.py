"""safetensors row by row, against the safetensors package."""

from __future__ import annotations

import struct
import subprocess
import sys
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
def test_row_file_is_read_by_safetensors(tmp_path: Path) -> None:
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


def test_row_file_of_transposed_rows_with_gradients(tmp_path: Path) -> None:
    given = torch.randn(3, 4, 2, requires_grad=True).transpose(1, 2)
    with RowFile(tmp_path / "a.safetensors", 3, {}) as file:
        file.write({"a": given})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], given)


def test_read_rows_equal_what_safetensors_wrote(tmp_path: Path) -> None:
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


def test_read_rows_reads_no_other_rows(tmp_path: Path) -> None:
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
def test_interrupted_row_file_leaves_the_old_file(
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


def test_row_file_with_too_few_rows_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 4 rows"):
        write(tmp_path / "a.safetensors", {"a": torch.zeros(2, 3)})
    assert not [*tmp_path.iterdir()]


def test_row_file_with_blocks_that_differ_raises(tmp_path: Path) -> None:
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


def test_reading_a_file_that_is_cut_off_raises(tmp_path: Path) -> None:
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


def test_two_writers_of_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    script = (
        "import sys, torch; from pathlib import Path; "
        "from sparsedm_compiler.data.rowfile import RowFile; "
        "file = RowFile(Path(sys.argv[1]), 4, {}); file.__enter__(); "
        "file.write({'a': torch.ones(4)}); file.__exit__(None, None, None)"
    )
    with RowFile(path, 4, {}) as file:
        file.write({"a": torch.zeros(2)})
        subprocess.run([sys.executable, "-c", script, str(path)], check=True)
        assert load_file(path)["a"].tolist() == [1, 1, 1, 1]
        file.write({"a": torch.zeros(2)})
    assert load_file(path)["a"].tolist() == [0, 0, 0, 0]
    assert [*tmp_path.iterdir()] == [path]


def test_an_os_error_inside_the_block_is_raised_unchanged(tmp_path: Path) -> None:
    error = OSError("of the caller")

    def interrupted() -> None:
        with RowFile(tmp_path / "a.safetensors", 4, {}):
            raise error

    with pytest.raises(OSError, match="of the caller") as caught:
        interrupted()
    assert caught.value is error
    assert not [*tmp_path.iterdir()]
